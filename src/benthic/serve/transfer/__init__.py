"""Moving cache blocks between instances: who may read (desk), how (memory), what is under way (reader)."""
