"""What the collector is kept from, and that it gets it back at the end of a process."""

from __future__ import annotations

import subprocess
import sys


def test_what_was_settled_is_collected_at_the_end_of_the_process() -> None:
    code = """
import os
from benthic import collector

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
    assert done.stdout == "freed"
