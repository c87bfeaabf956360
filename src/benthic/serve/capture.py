"""Which CUDA graphs an engine has, and capturing them where somebody watches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from benthic.sched.graph_sizes import prompt_sizes
from benthic.serve.graphs import NO_GRAPHS, GraphSizes, padded_sizes
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
        logger.info(
            "CUDA graphs of %s: %d sizes up to %d took %s", graphs.what, len(graphs), graphs.sizes[-1], took
        )


def graph_sizes(options: EngineOptions, device: torch.device) -> GraphSizes:
    """What gets a CUDA graph; nothing on a CPU, with `enforce_eager` or limits of 0.

    Steps with prompts get none where attention reads pages in place, row by row, or where engines run steps
    of their own and meet in passes.
    """
    if device.type != "cuda" or options.enforce_eager or not options.max_cudagraph_capture_size:
        return NO_GRAPHS
    decodes = padded_sizes(
        options.max_num_seqs,
        limit=options.max_cudagraph_capture_size,
        sizes=options.cudagraph_capture_sizes,
    )
    if options.batch_invariant or options.data_parallel_size > 1:
        return GraphSizes(decodes)
    return GraphSizes(
        decodes, prompt_sizes(min(options.max_prompt_graph_size, options.max_num_batched_tokens))
    )


def capture_progress(sizes: Sequence[int]) -> Iterable[int]:
    """A bar on the terminal while graphs are captured; nothing where there is no terminal."""
    console = Console(stderr=True)
    return track(sizes, "capturing CUDA graphs", console=console, disable=not console.is_terminal)
