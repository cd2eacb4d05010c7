"""Scores of a model: its whole validation split, lm-eval's tasks, and paired tests of two models."""
