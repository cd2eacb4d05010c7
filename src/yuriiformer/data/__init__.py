"""Text to tokens (`prepare`), tokens to batches (`corpus`). Imports no torch."""
