"""Estimate what a run will cost before it starts: batches, steps, memory, time."""
