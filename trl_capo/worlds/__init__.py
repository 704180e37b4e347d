"""Embedded worlds: tasks small enough to train a base model and study calibration on, on a CPU, in minutes."""
