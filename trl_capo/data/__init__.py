"""Data: the embedded arithmetic world and the mathematics sets of the Hub."""
