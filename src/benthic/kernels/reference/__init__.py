"""Plain-torch definitions of every op, in the papers' notation: what the fast versions must equal."""
