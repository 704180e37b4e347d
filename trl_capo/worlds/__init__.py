"""Embedded worlds: tasks small enough to train a base model and study its calibration on a CPU, in minutes."""
