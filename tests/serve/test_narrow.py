"""FP8 while serving: weights and latents take a byte each, and what that does to distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import prompts, random_model, request, serve, small_engine
from test_attend import Text, attended, ints, slot

from benthic.errors import ConfigError
from benthic.model.checkpoint import save_pretrained
from benthic.serve.attend import DecodeRows, PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from pathlib import Path


def prompt_logprobs(engine: Engine) -> torch.Tensor:
    """Of the tokens of some prompts, read in chunks, so that later chunks see what the cache kept."""
    asked = [request(str(i), p, prompt_logprobs=0) for i, p in enumerate(prompts(5, seed=4, shortest=30))]
    found = serve(engine, asked)
    rows = [row[0].logprob for a in found.values() for row in a.deltas[0].prompt_logprobs[1:]]
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return prompt_logprobs(small_engine(random_model(), max_num_batched_tokens=8))


@pytest.mark.parametrize(
    "how",
    [{"kv_cache_dtype": "fp8"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8", "quantization": "fp8"}],
)
def test_distributions_move_a_little_and_no_further(exact: torch.Tensor, how: dict) -> None:
    found = prompt_logprobs(small_engine(random_model(), max_num_batched_tokens=8, **how))
    off = (found - exact).abs()
    assert 0.001 < float(off.median()) < 0.25, off.median()
    shuffled = exact[torch.randperm(len(exact), generator=torch.Generator().manual_seed(0))]
    assert float(off.median()) < float((shuffled - exact).abs().median()) / 3


def test_an_fp8_cache_holds_a_byte_an_element() -> None:
    wide, narrow = (
        small_engine(random_model(), kv_cache_dtype=name)._runner.cache for name in ("auto", "fp8")
    )
    assert narrow.pages_LPBW.dtype == torch.float8_e4m3fn
    assert 4 * narrow.pages_LPBW.nbytes == wide.pages_LPBW.nbytes
    assert narrow.num_bytes == narrow.pages_LPBW.nbytes


def test_attention_over_an_fp8_cache_is_off_by_the_rounding_of_e4m3() -> None:
    layout = CacheLayout(layers=2, latent_dim=14, block_size=4, dtype=torch.float8_e4m3fn)
    cache = LatentCache(layout, 12, torch.device("cpu"))
    old, chunked = Text(9, 0), Text(11, 20)
    pages = {old: [7, 2, 9], chunked: [1, 11, 0]}
    for text, known in ((old, 8), (chunked, 6)):
        for position in range(known):
            row = torch.cat((text.latent[position], text.k_rope[position])).to(torch.float8_e4m3fn)
            cache.slots(1).view(torch.uint8)[slot(pages[text], position)] = row.view(torch.uint8)
    rows = [(old, 8), *((chunked, p) for p in range(6, 11))]
    step = StepLayout(
        slot_T=ints([slot(pages[text], p) for text, p in rows], torch.int64),
        decode=DecodeRows(1, ints([7, 2, 9]).view(1, 3), ints([9])),
        prefill=PrefillRows(
            cu_seqlens_q=ints([0, 5]),
            cu_seqlens_k=ints([0, 11]),
            max_seqlen_q=5,
            max_seqlen_k=11,
            context_slot_M=ints([slot(pages[chunked], p) for p in range(11)], torch.int64),
        ),
    )
    found = attended(cache, step, rows)
    expected = torch.stack([text.attended(p) for text, p in rows])
    error = float((found - expected).norm() / expected.norm())
    assert 0.003 < error < 0.06, error


def test_a_block_scaled_checkpoint_is_served_as_it_is_stored(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path / "nano", fp8=True)
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 16}
    kept = Engine.from_pretrained(tmp_path / "nano", EngineOptions(quantization="fp8", **sizes))
    widened = Engine.from_pretrained(tmp_path / "nano", EngineOptions(**sizes))
    bytes_of = [sum(p.nbytes for p in e._runner.model.layers.parameters()) for e in (kept, widened)]
    assert bytes_of[0] < 0.5 * bytes_of[1]
    asked = request("a", prompts(1, seed=5)[0], prompt_logprobs=0)
    rows = [serve(e, [asked])["a"].deltas[0].prompt_logprobs[1:] for e in (kept, widened)]
    both = torch.tensor([[row[0].logprob for row in each] for each in rows])
    assert 1e-4 < float((both[0] - both[1]).abs().median()) < 0.25


def test_sizes_of_graphs_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cudagraph_capture_sizes holds 0.*at least 1"):
        EngineOptions(cudagraph_capture_sizes=(4, 0))
    with pytest.raises(ConfigError, match=r"max_cudagraph_capture_size = -1"):
        EngineOptions(max_cudagraph_capture_size=-1)
