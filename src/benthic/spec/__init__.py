"""What exists: models, hardware and workloads as frozen values, with their sizes and costs (stdlib only)."""
