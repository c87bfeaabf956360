"""How long training takes, what memory and money it needs, and which layout is best (no torch)."""
