"""Calibration of sampled answers: metrics and selection, on plain arrays from any model and any trainer."""
