"""What is checked before training starts, one module a subject."""
