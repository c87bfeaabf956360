"""A linear layer as three products, so that the one for its weights can wait.

    output            y  = x W^T        forward
    input gradient    dx = dy W         backward, at once: the layer below needs it
    weight gradient   dW = dy^T x       backward, or later: nothing but the optimizer needs it

`Products` says in what numbers each is computed and what is kept for it; `WeightGradients` says when the
third one runs; `SplitLinear` makes a `linear` socket of the two. Zero-bubble pipelines (Qi et al. 2023) and
DualPipe (DeepSeek-V3 report section 3.2.1) fill idle slots with deferred weight gradients.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.errors import ScheduleError, ShapeError
from benthic.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Kept = tuple[Tensor, ...]
"""One operand in the form that a product reads: a cast copy, or FP8 values and their scales."""


class Sum(NamedTuple):
    """Where a weight gradient goes: float32, in the weight's shape.

    fresh: `into` holds nothing yet, whatever lies there: the gradient is written and not added.
    squares: takes parts [P] of the sum of squares of all of `into` once the gradient is written, from a
        product that has them without reading; None: nobody asks, as where a gradient is added.
    """

    into: Tensor
    fresh: bool = False
    squares: Callable[[Tensor], None] | None = None

    def give(self, parts: Tensor | None) -> None:
        """Hand parts of the sum of squares on, if a product had them and somebody asked."""
        if self.squares is not None and parts is not None:
            self.squares(parts)


class Products(Protocol):
    """In what numbers the three products are computed, and what is kept between forward and backward.

    `ends_E` is None for one weight `[O, I]`; for one weight per expert, `[E, O, I]`, it says where each
    expert's rows end. Rows past the last end come out of `output` and `input_gradient` as zeros and take no
    part in `weight_gradient`.
    """

    def keep_rows(self, x_RI: Tensor, ends_E: Tensor | None) -> Kept:
        """The rows, for `output` and for `weight_gradient`."""
        ...

    def keep_weight(self, weight: Tensor) -> Kept:
        """The weight, for `output` and for `input_gradient`."""
        ...

    def keep_gradient(self, dy_RO: Tensor, ends_E: Tensor | None) -> tuple[Kept, Kept]:
        """The gradient of the output, for `input_gradient` and for `weight_gradient`."""
        ...

    def keep_hidden(self, gate_up_RF2: Tensor) -> Kept:
        """SwiGLU of the rows, as `keep_rows` has it."""
        ...

    def keep_hidden_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Kept, Kept]:
        """SwiGLU's gradient of the rows, as `keep_gradient` has it."""
        ...

    def output(self, rows: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`x W^T` in `dtype`."""
        ...

    def network_output(
        self, hidden: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype
    ) -> Tensor:
        """`output`, of the second product of a network."""
        ...

    def input_gradient(self, dy: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`dy W` in `dtype`."""
        ...

    def weight_gradient(self, dy: Kept, rows: Kept, ends_E: Tensor | None, sum_: Sum | None = None) -> Tensor:
        """`dy^T x`, in the weight's shape and the recipe's dtype; an expert without rows gets zeros.

        Added to `sum_.into`, which is returned then, if there is one.
        """
        ...

    def of_copies(self) -> CopyProducts | None:
        """These products for experts as one step (`benthic.model.mixture`); None: it would gain nothing."""
        ...


class CopyProducts(Products, Protocol):
    """Products that read copies of tokens in the form that tokens have been brought into: `model.mixture`."""

    def spread(self, tokens: Kept, row_TK: Tensor) -> Kept:
        """What `keep_rows` gave for tokens, copied to the rows of all their copies."""
        ...

    def keep_copies_gradient(self, dout_TD: Tensor, row_TK: Tensor, ends_E: Tensor) -> tuple[Kept, Kept]:
        """What `keep_gradient` has, of the gradient of a sum over copies that all weigh one."""
        ...

    def keep_weighted_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, weight_R: Tensor, ends_E: Tensor
    ) -> tuple[Kept, Kept, Tensor]:
        """`keep_hidden_gradient` of rows times a weight each, and the gradient of these, float32 [R].

        `dhidden` is that of the weighted rows.
        """
        ...

    def weighted(self, hidden: Kept, weight_R: Tensor) -> Kept:
        """What `keep_hidden` gave, each row times a weight, for `weight_gradient`."""
        ...


@dataclass(frozen=True)
class PlainProducts:
    """Products in the operands' own dtype, or with every operand cast to `dtype`.

    wide_gradients: weight gradients leave the product in float32 instead of the operands' dtype, as the
        DeepSeek-V3 report has them (Fig. 6).
    """

    dtype: torch.dtype | None = None
    wide_gradients: bool = False

    def keep_rows(self, x_RI: Tensor, ends_E: Tensor | None) -> Kept:  # noqa: ARG002 (needs no borders)
        """The rows, cast."""
        return (self._cast(x_RI),)

    def keep_weight(self, weight: Tensor) -> Kept:
        """The weight, cast."""
        return (self._cast(weight),)

    def keep_gradient(self, dy_RO: Tensor, ends_E: Tensor | None) -> tuple[Kept, Kept]:  # noqa: ARG002
        """One cast gradient for both products; autograd may hand in an expanded one."""
        dy = (self._cast(dy_RO).contiguous(),)
        return dy, dy

    def keep_hidden(self, gate_up_RF2: Tensor) -> Kept:
        """SwiGLU, cast."""
        return (self._cast(ops.swiglu(gate_up_RF2)),)

    def keep_hidden_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Kept, Kept]:
        """SwiGLU's gradient, cast."""
        return self.keep_gradient(ops.swiglu_gradient(gate_up_RF2, dhidden_RF), ends_E)

    def output(self, rows: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`x W^T`."""
        (x_RI,), (w,) = rows, weight
        y = F.linear(x_RI, w) if ends_E is None else ops.grouped_linear(x_RI, w, ends_E)
        return y.to(dtype)

    network_output = output

    def input_gradient(self, dy: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`dy W`."""
        (dy_RO,), (w,) = dy, weight
        dx = dy_RO @ w if ends_E is None else ops.grouped_input_gradient(dy_RO, w, ends_E)
        return dx.to(dtype)

    def weight_gradient(self, dy: Kept, rows: Kept, ends_E: Tensor | None, sum_: Sum | None = None) -> Tensor:
        """`dy^T x`."""
        (dy_RO,), (x_RI,) = dy, rows
        if sum_ is not None:
            into, fresh, wanted = sum_.into, sum_.fresh, sum_.squares is not None and ends_E is not None
            sum_.give(ops.add_weight_gradient(into, dy_RO, x_RI, ends_E, fresh=fresh, squares=wanted))
            return into
        narrow = x_RI.dtype.itemsize < 4
        dtype = torch.float32 if self.wide_gradients and narrow else x_RI.dtype
        return ops.weight_gradient(dy_RO, x_RI, ends_E, dtype=dtype)

    def of_copies(self) -> None:
        """A copy is what a product reads."""

    def _cast(self, operand: Tensor) -> Tensor:
        return operand if self.dtype is None else operand.to(self.dtype)


@dataclass
class WeightGradients:
    """When weight gradients are computed, and where they are added.

    At once, unless deferring: then each is put aside as a call, and the calls of one backward pass form a
    chunk that runs later. A deferred gradient takes the same way to its parameter as an immediate one:

    - through autograd from the weight (or view of a parameter) that was multiplied, so that hooks fire
      (they also fire during the deferred pass, and then find `.grad` as it was);
    - or, for a parameter with a float32 sum (`sum_into`), straight into that sum: autograd would round it to
      the parameter's dtype first. `.grad` then stays empty and hooks of the parameter are not called.

    A deferred call holds the kept rows and the output's gradient, not the graph of the backward pass.
    """

    _sums: dict[Tensor, Callable[[], Sum]] = field(default_factory=dict, repr=False)
    _chunks: dict[int, list[Callable[[], None]]] = field(default_factory=dict, repr=False)
    _filling: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _deferring: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def pending(self) -> int:
        """Chunks that have not run, the one that is being filled included; 0 at the end of a step."""
        return len(self._chunks) + bool(self._filling)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Put weight gradients aside while a backward pass runs inside."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    def flush(self) -> int:
        """Close the chunk that the last backward pass filled, which may be empty; return its number."""
        number = next(self._numbers)
        self._chunks[number], self._filling = self._filling, []
        return number

    def run_oldest(self) -> None:
        """Compute the gradients of the chunk that has waited longest.

        Raises:
            ScheduleError: no chunk is waiting.
        """
        if not self._chunks:
            message = "0 chunks of weight gradients are waiting; flush one after each deferred backward pass."
            raise ScheduleError(message)
        self.run(next(iter(self._chunks)))

    def run(self, number: int) -> None:
        """Compute the gradients of one chunk, in the order in which its backward pass deferred them.

        Raises:
            ScheduleError: the chunk has run already or never was.
        """
        if number not in self._chunks:
            message = f"chunk {number} of weight gradients is not waiting; waiting: {list(self._chunks)}."
            raise ScheduleError(message)
        for compute in self._chunks.pop(number):
            compute()

    def sum_into(self, param: Tensor, sum_of: Callable[[], Sum]) -> None:
        """Add gradients of `param` to the float32 tensor that `sum_of` gives instead of to `param.grad`.

        It is asked for each gradient anew, so that the sum may be allocated late and freed early, and knows
        which is the first; it must be laid out as the parameter is.
        """
        self._sums[param] = sum_of

    def room_for(self, weight: Tensor) -> Sum | None:
        """The part of the owner's float32 sum that `weight` is a view of; None: no sum.

        Whoever asks writes all of it.

        Raises:
            ShapeError: parameter and sum are laid out differently: a view of one is none of the other.
        """
        owner = owner_of(weight)
        if owner not in self._sums:
            return None
        into, fresh, squares = self._sums[owner]()
        if (owner.shape, owner.stride()) != (into.shape, into.stride()):
            message = (
                f"a parameter of shape {tuple(owner.shape)} and strides {owner.stride()} cannot be summed "
                f"into {tuple(into.shape)} with strides {into.stride()}; lay the sum out as the parameter."
            )
            raise ShapeError(message)
        if weight is owner:
            return Sum(into, fresh, squares)
        if fresh and weight.numel() < owner.numel():  # other parts of the owner may never be written
            into.zero_()
            fresh, squares = False, None
        offset = into.storage_offset() + weight.storage_offset() - owner.storage_offset()
        return Sum(into.as_strided(weight.shape, weight.stride(), offset), fresh, squares)

    def take(self, weight: Tensor, compute: Callable[[Sum | None], Tensor]) -> Tensor | None:
        """Decide about one gradient during a backward pass: what autograd shall add to `weight` now.

        `compute` gives the gradient, or adds it to the sum that it is called with. None when the gradient is
        deferred or has gone into a sum.

        Raises:
            ScheduleError: deferring, and `weight` was computed, so that its own graph will be gone.
        """
        if self._deferring:
            if not owner_of(weight).is_leaf:
                message = (
                    f"the weight gradient of a computed tensor {tuple(weight.shape)} cannot wait: the graph "
                    "behind it is freed. Hand the socket a parameter or a view of one."
                )
                raise ScheduleError(message)
            self._filling.append(partial(self._add_later, weight, compute))
            return None
        sum_ = self.room_for(weight)
        dweight = compute(sum_)
        return dweight.to(weight.dtype) if sum_ is None else None

    def _add_later(self, weight: Tensor, compute: Callable[[Sum | None], Tensor]) -> None:
        with torch.no_grad():
            sum_ = self.room_for(weight)
            dweight = compute(sum_)
        if sum_ is None:
            torch.autograd.backward(weight, dweight.to(weight.dtype))


def owner_of(weight: Tensor) -> Tensor:
    """The parameter that a view shows, or the tensor itself."""
    base = weight._base  # noqa: SLF001 (public in all but name: torch documents views by it)
    return weight if base is None else base
