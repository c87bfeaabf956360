"""What the collector is kept from, and that it gets it back at the end of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("loaded", "said"), [("sys.modules['triton'] = None", "freed"), ("", "")])
def test_what_was_settled_is_collected_at_the_end_where_triton_is_loaded(loaded: str, said: str) -> None:
    code = f"""
import os, sys
from benthic import collector
{loaded}

class Ring:
    def __init__(self, write):
        self.ring, self.write = self, write

    def __del__(self):
        self.write(1, b"freed")

ring = Ring(os.write)
collector.settle()
del ring
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == said
