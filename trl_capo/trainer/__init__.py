"""The seam: all contact with TRL's private methods, as a stack of layers (see CONTRIBUTING.md)."""
