"""From data to checkpoint."""
