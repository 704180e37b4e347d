"""Pages and figures that compare runs."""
