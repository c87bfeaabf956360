"""The serving attend socket: absorbed and expanded rows of one step against the same pages."""

from __future__ import annotations

import pytest
import torch

from benthic.kernels.ops import store_latent
from benthic.model.local import plain_linear
from benthic.model.mla import LatentUp
from benthic.serve.attend import DecodeRows, PagedAttend, PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache

HEADS, NOPE, ROPE, VALUE, LATENT, BLOCK = 3, 8, 4, 6, 10, 4
SCALE = 0.4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


UP = LatentUp(random(HEADS * (NOPE + VALUE), LATENT), NOPE, VALUE, plain_linear)


class Text:
    """One sequence: what every token asks and leaves, and attention by its formula."""

    def __init__(self, length: int, seed: int) -> None:
        self.q_nope, self.q_rope = (
            random(length, HEADS, NOPE, seed=seed),
            random(length, HEADS, ROPE, seed=seed + 1),
        )
        self.latent, self.k_rope = random(length, LATENT, seed=seed + 2), random(length, ROPE, seed=seed + 3)

    def attended(self, position: int) -> torch.Tensor:
        """DeepSeek-V3 report eq. (10) for one position, head by head."""
        up = UP.weight.view(HEADS, NOPE + VALUE, LATENT)
        out = []
        for head in range(HEADS):
            keys = self.latent[: position + 1] @ up[head, :NOPE].t()
            values = self.latent[: position + 1] @ up[head, NOPE:].t()
            scores = (
                keys @ self.q_nope[position, head] + self.k_rope[: position + 1] @ self.q_rope[position, head]
            )
            out.append((scores * SCALE).softmax(0) @ values)
        return torch.stack(out)


def operands(rows: list[tuple[Text, int]]) -> tuple[torch.Tensor, ...]:
    names = ("q_nope", "q_rope", "latent", "k_rope")
    return tuple(torch.stack([getattr(text, name)[position] for text, position in rows]) for name in names)


def attended(cache: LatentCache, layout: StepLayout, rows: list[tuple[Text, int]]) -> torch.Tensor:
    """As the network does it: rows are written where the socket says, and only then attended to."""
    attend, (q_nope, q_rope, latent, k_rope) = PagedAttend(cache, layout), operands(rows)
    into = attend.slots(1)
    store_latent(into.cache_PBW, latent, k_rope, into.slot_T)
    k_rope, latent = into.returned(k_rope, latent)
    return attend(q_nope, q_rope, latent, k_rope, UP, layer=1, scale=SCALE)


def slot(page: list[int], position: int) -> int:
    return page[position // BLOCK] * BLOCK + position % BLOCK


@pytest.fixture
def cache() -> LatentCache:
    layout = CacheLayout(layers=2, latent_dim=LATENT + ROPE, block_size=BLOCK, dtype=torch.float64)
    made = LatentCache(layout, 12, torch.device("cpu"))
    made.pages_LPBW.fill_(torch.nan)
    return made


def write(cache: LatentCache, text: Text, pages: list[int], positions: range) -> None:
    for position in positions:
        row = torch.cat((text.latent[position], text.k_rope[position]))
        cache.slots(1)[slot(pages, position)] = row


def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_a_step_of_decodes_and_chunks_equals_the_formula(cache: LatentCache) -> None:
    old, young, chunked, fresh = (Text(n, seed) for n, seed in ((9, 0), (4, 10), (11, 20), (3, 30)))
    pages = {old: [7, 2, 9], young: [4], chunked: [1, 11, 0], fresh: [5]}
    write(cache, old, pages[old], range(8))
    write(cache, young, pages[young], range(3))
    write(cache, chunked, pages[chunked], range(6))
    rows = [(old, 8), (young, 3), *((chunked, p) for p in range(6, 11)), *((fresh, p) for p in range(3))]
    context = [(chunked, p) for p in range(11)] + [(fresh, p) for p in range(3)]
    layout = StepLayout(
        slot_T=ints([slot(pages[text], p) for text, p in rows], torch.int64),
        decode=DecodeRows(1, ints([7, 2, 9, 4, 0, 0]).view(2, 3), ints([9, 4])),
        prefill=PrefillRows(
            cu_seqlens_q=ints([0, 5, 8]),
            cu_seqlens_k=ints([0, 11, 14]),
            max_seqlen_q=5,
            max_seqlen_k=11,
            context_slot_M=ints([slot(pages[text], p) for text, p in context], torch.int64),
        ),
    )
    found = attended(cache, layout, rows)
    torch.testing.assert_close(found, torch.stack([text.attended(p) for text, p in rows]))
    assert cache.layer(0).isnan().all(), "another layer's pages were touched"


def test_several_queries_of_a_sequence_see_each_their_own_past(cache: LatentCache) -> None:
    text = Text(9, 40)
    write(cache, text, [3, 8, 6], range(6))
    rows = [(text, 6), (text, 7), (text, 8)]
    layout = StepLayout(
        slot_T=ints([slot([3, 8, 6], p) for _, p in rows], torch.int64),
        decode=DecodeRows(3, ints([3, 8, 6]).view(1, 3), ints([9])),
        prefill=None,
    )
    found = attended(cache, layout, rows)
    torch.testing.assert_close(found, torch.stack([text.attended(p) for _, p in rows]))


def test_fresh_prompts_do_not_read_the_cache_back(cache: LatentCache) -> None:
    texts = [Text(5, 50), Text(2, 60)]
    rows = [(text, p) for text, n in zip(texts, (5, 2), strict=True) for p in range(n)]
    bounds = ints([0, 5, 7])
    layout = StepLayout(
        slot_T=torch.arange(7),
        decode=None,
        prefill=PrefillRows(bounds, bounds, max_seqlen_q=5, max_seqlen_k=5, context_slot_M=None),
    )
    found = attended(cache, layout, rows)
    torch.testing.assert_close(found, torch.stack([text.attended(p) for text, p in rows]))
    torch.testing.assert_close(cache.slots(1)[:5, :LATENT], texts[0].latent)
