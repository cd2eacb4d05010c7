"""From run directories to a verdict: statistics, a table, one page. Reads files only; imports no torch."""
