"""What to do next: pipeline tables, request batching and KV blocks (stdlib only, no clock, no I/O)."""
