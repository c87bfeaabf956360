"""How well a server does: load it on a schedule, measure what a client sees, find the rate it can bear."""
