"""What happens inside a trained model; docs/inspect.md gives the equation of every quantity."""
