"""Tensor and sequence parallelism, put round the products of a network that does not know of it.

A rank of the tensor group holds some heads and some feed-forward columns of every layer, and between these
products some of the tokens (Korthikanti et al. 2022, section 4.2.2). Products whose output is divided gather
their tokens first; those that sum over what is divided leave partial sums, which are summed over the group
while each rank gets its own tokens back. The narrow down-projections of latent attention are whole on every
rank: they work on the rank's own tokens, and their latents are gathered instead of the hidden state
(DeepSeek-V3: 1536 + 576 elements a token instead of 7168).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic.parallel.collectives import gather_tokens, sum_tokens
from benthic.parallel.tokens import by_rank, by_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear as LinearSocket
    from benthic.parallel.mesh import Group

    Product = Callable[[Tensor, LinearSocket], Tensor]

GATHERED_BEFORE: Final = ("attn.q", "attn.q_b", "mlp", "shared")
GATHERED_AFTER: Final = ("attn.kv_a",)
SUMMED_AFTER: Final = ("attn.o", "mlp", "shared")


def divide_products(model: DeepSeek, group: Group, *, row_part: int) -> None:
    """Let the products of `model`, which hold this rank's part, take and return this rank's tokens.

    Every rank of `group` holds `row_part` tokens of each row of a microbatch; one rank alone changes nothing.
    Cost a block, forward and again backward: two all-gathers and a reduce-scatter in attention, one of each
    in the dense network or the shared experts.
    """
    if group.size == 1:
        return
    tokens = _Tokens(group, row_part)
    for name, module in model.named_modules():
        if name.endswith(GATHERED_BEFORE):
            _replace(module, tokens.gathered_before)
        elif name.endswith(GATHERED_AFTER):
            _replace(module, tokens.gathered_after)
        if name.endswith(SUMMED_AFTER):
            _replace(module, tokens.summed_after)


def _replace(module: nn.Module, wrap: Callable[[Product], Product]) -> None:
    setattr(module, "forward", wrap(module.forward))  # noqa: B010 (a method of this instance alone)


class _Tokens:
    """Changes between this rank's tokens and those of the whole group, which attention and products see."""

    def __init__(self, group: Group, row_part: int) -> None:
        self._group, self._row_part = group, row_part

    def gathered_before(self, product: Product) -> Product:
        return lambda x_TI, linear: product(self._gather(x_TI), linear)

    def gathered_after(self, product: Product) -> Product:
        return lambda x_TI, linear: self._gather(product(x_TI, linear))

    def summed_after(self, product: Product) -> Product:
        return lambda x_TI, linear: self._sum(product(x_TI, linear))

    def _gather(self, x_TX: Tensor) -> Tensor:
        return by_row(gather_tokens(x_TX, self._group), self._group.size, self._row_part)

    def _sum(self, x_TX: Tensor) -> Tensor:
        return sum_tokens(by_rank(x_TX, self._group.size, self._row_part), self._group)
