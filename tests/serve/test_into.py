"""A step's logits are written where they are wanted, by the product itself where the library makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from small_engine import random_model

from benthic.kernels import ops
from benthic.model.block_scaled import BlockScaledLinear
from benthic.model.local import LocalExchange, PlainLinear, plain_linear
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.graphs import Served
from benthic.serve.into import Into, by_library
from benthic.serve.plugs import Plugs
from benthic.serve.table_linear import TableLinear


@dataclass
class Doubled(PlainLinear):
    """A socket with products of its own."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(x))
        return 2 * super().__call__(x, weight)


def test_the_librarys_products_are_written_where_they_are_wanted_and_others_are_what_they_were():
    x, weight = torch.randn(9, 24), torch.randn(40, 24)
    out, own = torch.full((9, 40), torch.nan), Doubled()
    for linear in (plain_linear, TableLinear(), BlockScaledLinear({})):
        out.fill_(torch.nan)
        assert Into(linear, out)(x, weight).data_ptr() == out.data_ptr()
        assert torch.equal(out, linear(x, weight))
    out.fill_(torch.nan)
    assert torch.equal(Into(own, out)(x, weight), own(x, weight))
    assert own.asked == [9, 9]
    part = Into(plain_linear, out)(x, weight[:20])  # as of a rank that has some of the vocabulary
    assert torch.equal(part, plain_linear(x, weight[:20]))
    assert out.isnan().all()


def test_products_that_have_kernels_of_their_own_are_not_the_librarys():
    x, weight = torch.randn(8, 24), torch.randn(40, 24)
    narrow = BlockScaledLinear({weight.data_ptr(): (ops.quantise_fp8_weight(weight),)})
    assert not by_library(narrow, x, weight)
    assert by_library(narrow, x, weight.clone())
    assert not by_library(TableLinear(), x, weight)
    assert not by_library(plain_linear, x[None], weight)


@pytest.mark.parametrize("linear", [plain_linear, Doubled()], ids=["written", "copied"])
def test_a_steps_logits_come_to_lie_in_its_buffer(linear):
    model = random_model()
    layout = CacheLayout.of(model.config, block_size=4, dtype=torch.float32)
    cache = LatentCache(layout, 2, torch.device("cpu"))
    served = Served.of(model, cache, Plugs(linear, LocalExchange(model.config.n_routed_experts)))
    hidden = torch.randn(5, model.config.hidden_size)
    out = torch.full((5, model.config.vocab_size), torch.nan)
    with torch.inference_mode():
        served.logits_into(hidden, out)
        assert torch.equal(out, served.logits(hidden))
