"""The seam: all contact with TRL's private methods, in four layers."""
