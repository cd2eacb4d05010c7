"""One file per rule; `yuriiformer.rule.all_rules` finds them. To add one, add a file."""
