"""Several methods and seeds from one base, compared."""
