"""What a run leaves behind for others: its record, its model card, its upload to the Hub."""
