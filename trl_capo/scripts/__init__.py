"""Command-line entry points; each module has `make_parser` and `main`."""
