"""How the network is spread over ranks: groups, shards, token exchange, pipeline executor, ZeRO."""
