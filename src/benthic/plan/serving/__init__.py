"""Serving answered without a GPU: the live scheduler, driven by a clock that jumps."""
