"""Moving cache blocks between instances: who may read (desk), how (memory) and what is on its way (reader)."""
