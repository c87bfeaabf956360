"""Which CUDA graphs an engine has, and capturing them where somebody watches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from benthic.serve.graphs import padded_sizes
from benthic.units import binary_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from benthic.serve.graphs import Progress
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import Runner

logger = logging.getLogger("benthic.serve.engine")


def capture(runner: Runner, progress: Progress) -> None:
    """Capture the runner's CUDA graphs, if it is to have any."""
    for graphs in runner.all_graphs:
        graphs.capture(progress)
        took = binary_bytes(graphs.num_bytes)
        what = "CUDA graphs of %d rows a sequence: %d batch sizes up to %d took %s"
        logger.info(what, graphs.queries, len(graphs), graphs.sizes[-1], took)


def graph_sizes(options: EngineOptions, device: torch.device) -> tuple[int, ...]:
    """Padded batch sizes that get a CUDA graph; none on a CPU, with `enforce_eager` or a limit of 0."""
    if device.type != "cuda" or options.enforce_eager or not options.max_cudagraph_capture_size:
        return ()
    return padded_sizes(
        options.max_num_seqs,
        limit=options.max_cudagraph_capture_size,
        sizes=options.cudagraph_capture_sizes,
    )


def capture_progress(sizes: Sequence[int]) -> Iterable[int]:
    """A bar on the terminal while graphs are captured; nothing where there is no terminal."""
    console = Console(stderr=True)
    return track(sizes, "capturing CUDA graphs", console=console, disable=not console.is_terminal)
