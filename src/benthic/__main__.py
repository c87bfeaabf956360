"""`python -m benthic`, for launchers that start modules: `torchrun --nproc-per-node 8 -m benthic train …`."""

from __future__ import annotations

from benthic.cli.main import main

main()
