"""From request to token."""
