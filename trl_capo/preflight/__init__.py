"""Checks before training starts, one module per subject."""
