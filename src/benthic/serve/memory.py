"""Where a GPU's memory goes: weights, activations of the largest step, graphs; the cache gets the rest.

What activations and graphs take is measured, on this model and this GPU, before the cache is allocated: one
prefill step of `max_num_batched_tokens` rows and the logits of `max_num_seqs` rows, then the captures of the
two largest graphs of decodes, and of steps with prompts, over a cache of one block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.serve.attend import PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.graphs import Served
from benthic.serve.prompt_graphs import PromptGraphs
from benthic.serve.step_graphs import StepBuffers, StepGraphs
from benthic.serve.steps import StepBuilder
from benthic.units import binary_bytes, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.model.network import DeepSeek
    from benthic.serve.graphs import Graphs, GraphSizes
    from benthic.serve.options import EngineOptions
    from benthic.serve.plugs import Plugs

SAMPLING_COPIES = 6
"""Float32 copies of the logits that a sampling step holds at once, its float64 sums counted as two."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one GPU; `in_use` is all that is there before the cache, weights and other processes too."""

    total: int
    in_use: int
    weights: int
    activations: int
    graphs: int

    @property
    def reserve(self) -> int:
        """What the cache must leave free."""
        return self.activations + self.graphs

    def lines(self, utilization: float, cache: int) -> list[str]:
        """The account, one line for each use."""
        left = self.total - self.in_use - self.reserve - cache
        return [
            f"{binary_bytes(self.total)} on the GPU, of which {percent(utilization)} may be used",
            f"{binary_bytes(self.weights)} weights",
            f"{binary_bytes(self.in_use - self.weights)} libraries, context, other processes",
            f"{binary_bytes(self.activations)} activations (peak of the largest step)",
            f"{binary_bytes(self.graphs)} CUDA graphs (from the two largest)",
            f"{binary_bytes(cache)} latent cache",
            f"{binary_bytes(left)} left free",
        ]


def measure_use(
    model: DeepSeek,
    layout: CacheLayout,
    options: EngineOptions,
    plugs: Plugs,
    *,
    sizes: GraphSizes,
    max_model_len: int,
) -> MemoryUse:
    """Run the largest step and capture the two largest graphs over a cache of one block; keep nothing.

    Each number of drafts has graphs of its own, which are taken to cost what those without drafts do.
    Cost: five prefill steps and four decode steps.
    """
    device = model.head_weight().device
    weights = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    cache = LatentCache(layout, 1, device)
    activations = peak_of_step(model, cache, options, plugs, max_model_len=max_model_len)
    columns, drafts, graphs = -(-max_model_len // layout.block_size), options.most_drafts, 0
    # each with a pool of its own: one whose graphs are all gone takes no new ones
    if sizes.decodes:
        graphs += (1 + drafts) * decode_graph_bytes(Served.of(model, cache, plugs), sizes.decodes, columns)
    if sizes.prompts:
        served = Served.of(model, cache, plugs)
        graphs += prompt_graph_bytes(served, sizes.prompts, options, columns)
        del served
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return MemoryUse(
        total=total, in_use=total - free, weights=weights, activations=activations, graphs=graphs
    )


@torch.inference_mode()
def peak_of_step(
    model: DeepSeek,
    cache: LatentCache,
    options: EngineOptions,
    plugs: Plugs,
    *,
    max_model_len: int,
) -> int:
    """Bytes that a step of fresh prompts adds at its peak, or sampling `max_num_seqs` rows after it."""
    device = model.head_weight().device
    rows, longest = options.max_num_batched_tokens, min(options.max_num_batched_tokens, max_model_len)
    starts = [*range(0, rows, longest), rows]
    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    # as wide as the longest context's: an attention that reads pages in place has room for all of its parts
    pages_SP = bounds.new_zeros(len(starts) - 1, -(-max_model_len // cache.layout.block_size))
    prefill = PrefillRows(bounds, bounds, longest, longest, None, pages_SP)
    tokens_T = torch.arange(rows, device=device) % model.config.vocab_size
    sockets = plugs.sockets(cache, StepLayout(torch.full_like(tokens_T, -1), None, prefill))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    hidden_TD = model(tokens_T, tokens_T % longest, sockets).hidden_TD
    logits_SV = model.logits(hidden_TD[: options.max_num_seqs * (1 + options.most_drafts)], plugs.linear)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return max(peak, logits_SV.numel() * 4 * SAMPLING_COPIES)


def decode_graph_bytes(served: Served, sizes: Sequence[int], columns: int) -> int:
    """Bytes that graphs of decode steps of all sizes will take."""
    block, model = served.cache.layout.block_size, served.model
    steps = StepBuilder(
        max_num_seqs=sizes[-1],
        max_model_len=columns * block,
        block_size=block,
        device=model.embed.weight.device,
    )
    return captured_bytes(
        lambda: StepGraphs(
            served,
            sizes[-2:],
            1,
            steps=steps,
            buffers=StepBuffers.blank(model, sizes[-1], 1, columns),
        ),
        len(sizes),
    )


def prompt_graph_bytes(served: Served, sizes: Sequence[int], options: EngineOptions, columns: int) -> int:
    """Bytes that graphs of steps with prompts will take: all are taken to cost what those with context do."""
    make = functools.partial(
        PromptGraphs.kinds,
        served,
        max_num_seqs=options.max_num_seqs,
        columns=columns,
        drafts=options.most_drafts,
    )
    return captured_bytes(lambda: make(sizes[-2:])[-1], len(make(sizes)) * len(sizes))


def captured_bytes(make: Callable[[], Graphs], count: int) -> int:
    """Bytes of `count` graphs: the two largest are made and captured, others take what the second does."""
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    graphs = make()
    graphs.capture(iter)
    after, _ = torch.cuda.mem_get_info()
    return max(0, before - after) + (count - len(graphs)) * graphs.bytes_of(graphs.sizes[0])
