"""The recipe, the run directory, checkpoints and the loop."""
