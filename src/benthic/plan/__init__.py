"""From question to answer (no torch)."""
