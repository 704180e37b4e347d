"""Evaluation of a model: sample completions with their confidence, then grade them."""
