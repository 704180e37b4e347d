"""What is checked before training starts, one module a subject; `trl_capo.checks` holds the others."""
