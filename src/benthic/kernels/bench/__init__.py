"""Every op of `benthic.kernels` beside its peers, and how near each comes to what the machine can do."""
