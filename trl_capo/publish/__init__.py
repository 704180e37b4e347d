"""Publish a run: its record, its model card, and its upload to the Hub."""
