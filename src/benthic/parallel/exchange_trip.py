"""The gradient of an expert-parallel exchange, written once for every way to move rows.

A trip is one dispatch and its combine. It moves rows in two ways only: *out*, one copy of a token's row to
each rank that holds some of its experts, and *home*, one row per token and rank, summed where the token
lives. Forward is out (dispatch) and home (combine); backward is out (gradient of combine) and home (gradient
of dispatch) with the same routing.

Each way is started in one autograd node and finished in the next. What autograd passes between the two is a
tensor of one element, the link: the rows are still moving, and whoever copied or summed them too early would
read garbage. Links also survive being cut at a leaf between two phases.

Numerics: a rank sums its copies of a token in float32 in the order of k and rounds the sum to the rows'
dtype; the token's own rank sums what the ranks sent in float32 in the order of ranks and rounds again.
Gradients likewise. Every exchange that keeps to this gives the same bits.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from benthic.errors import ShapeError
from benthic.kernels import ops
from benthic.model.sockets import Arrived, InFlight

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.parallel.exchange_routes import Arrivals

MovingT = TypeVar("MovingT")


class Here(NamedTuple):
    """Tokens that arrived: their rows, and in the forward direction their routing and weights."""

    x_AD: Tensor
    arrivals: Arrivals
    weight_AK: Tensor


class Trip(ABC, Generic[MovingT]):
    """One dispatch and its combine; subclasses move rows.

    `MovingT` is a transfer that was started. `backward` holds the one that a backward pass has in flight.
    """

    backward: MovingT | None = None

    @abstractmethod
    def send_out(self, x_TD: Tensor) -> MovingT:
        """Start sending a copy of each row to every rank that holds some of its token's experts."""

    @abstractmethod
    def receive(self, moving: MovingT) -> Here:
        """Wait for tokens of a dispatch."""

    @abstractmethod
    def receive_gradient(self, moving: MovingT) -> Tensor:
        """Wait for rows `dout_AD` of a backward pass, in the order in which the tokens arrived."""

    @abstractmethod
    def release(self, moving: MovingT) -> None:
        """What `receive` or `receive_gradient` returned has been read: its memory may be overwritten."""

    @abstractmethod
    def send_home(
        self, rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor | None, dweight_AK: Tensor | None
    ) -> MovingT:
        """Start sending `sum_k weight_ak rows[row_ak]` home, and in backward `dweight_AK` too."""

    @abstractmethod
    def receive_home(self, moving: MovingT) -> tuple[Tensor, Tensor | None]:
        """Wait for what the ranks send home and sum it: `(out_TD, dweight_TK)`."""

    def take_backward(self) -> MovingT:
        """The transfer that the backward pass has in flight."""
        moving, self.backward = self.backward, None
        assert moving is not None, "backward reached the end of a transfer that it did not start"  # noqa: S101
        return moving


class Flight(Generic[MovingT]):
    """The handle of a transfer: the trip it belongs to and what is moving. Compared by identity."""

    def __init__(self, trip: Trip[MovingT], moving: MovingT) -> None:
        self.trip = trip
        self.moving = moving


def start_dispatch(trip: Trip[Any], moving: Any, x_TD: Tensor, weight_TK: Tensor) -> InFlight:
    """Link a dispatch that `moving` started to the tensors that it took."""
    return InFlight((_Departed.apply(x_TD, weight_TK, trip),), Flight(trip, moving))


def finish_dispatch(flight: InFlight) -> Arrived:
    """Wait, and copy each token that arrived to each of its experts here."""
    (link,), handle = flight.tensors, flight.handle
    here = handle.trip.receive(handle.moving)
    rows_RD, weight_AK = _Arrived.apply(link, handle.trip, here)
    handle.trip.release(handle.moving)
    return Arrived(rows_RD, here.arrivals.ends_E, weight_AK, (handle.trip, here.arrivals.row_AK))


def start_combine(rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
    """Sum each token's copies here with their weights and send the sums home."""
    trip, row_AK = arrived.handle
    # The link comes first and saves all that backward needs: recomputation stops there and sends nothing.
    link = _Weighed.apply(rows_RD, arrived.weight, row_AK, trip)
    with torch.no_grad():
        moving = trip.send_home(rows_RD, row_AK, arrived.weight, None)
    if beside and torch.is_grad_enabled():  # one tensor waits, not two
        beside = (functools.reduce(torch.add, beside),)
    return InFlight((link, *beside), Flight(trip, moving))


def finish_combine(flight: InFlight) -> Tensor:
    """Wait for the sums and add them up in the order of ranks, then to what is beside."""
    (link, *beside), handle = flight.tensors, flight.handle
    out_TD: Tensor = _Returned.apply(link, handle.trip, handle.moving)
    return ops.added(out_TD, tuple(beside))


def check_choice(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> None:
    """Refuse tokens, experts and weights that disagree.

    Raises:
        ShapeError: they do.
    """
    if expert_TK.shape != weight_TK.shape or expert_TK.shape[0] != x_TD.shape[0]:
        msg = (
            f"dispatch: {x_TD.shape[0]} tokens, experts {tuple(expert_TK.shape)} and weights "
            f"{tuple(weight_TK.shape)} disagree; expected [T, D], [T, K] and [T, K]"
        )
        raise ShapeError(msg)
    if weight_TK.dtype != torch.float32:
        msg = (
            f"dispatch: weights travel in float32, but these are {weight_TK.dtype}; pass `weight_TK.float()`"
        )
        raise ShapeError(msg)


class _Departed(torch.autograd.Function):
    """Tokens left. Backward ends the way home of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, trip: Trip[Any]) -> Tensor:  # noqa: ARG004 (linked)
        """Only link: the rows are moving already."""
        ctx.trip = trip
        return x_TD.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ARG004 (a link's)
        """Gradients of tokens and weights, summed over the ranks they went to."""
        dx_TD, dweight_TK = ctx.trip.receive_home(ctx.trip.take_backward())
        return dx_TD, dweight_TK, None


class _Arrived(torch.autograd.Function):
    """Rows sorted by expert. Backward sums a token's copies here and starts the way home."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, trip: Trip[Any], here: Here) -> tuple[Tensor, Tensor]:
        """A gather."""
        arrivals = here.arrivals
        ctx.trip, ctx.row_AK, ctx.like = trip, arrivals.row_AK, link
        top_k = arrivals.row_AK.shape[1]
        rows_RD = ops.gather_copies(here.x_AD, arrivals.copy_R, arrivals.ends_E, top_k=top_k)
        return rows_RD, here.weight_AK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Start the way home."""
        drows_RD, dweight_AK = grads
        ctx.trip.backward = ctx.trip.send_home(drows_RD, ctx.row_AK, None, dweight_AK)
        return torch.zeros_like(ctx.like), None, None


class _Weighed(torch.autograd.Function):
    """Rows leave for home. Backward ends the way out of the output's gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_AK: Tensor, row_AK: Tensor, trip: Trip[Any]) -> Tensor:
        """Only link and save."""
        ctx.save_for_backward(rows_RD, weight_AK)
        ctx.trip, ctx.row_AK = trip, row_AK
        return rows_RD.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ARG004 (a link's)
        """Gradients of the experts' rows and of the weights that arrived with them."""
        rows_RD, weight_AK = ctx.saved_tensors
        moving = ctx.trip.take_backward()
        dout_AD = ctx.trip.receive_gradient(moving)
        drows_RD, dweight_AK = ops.sum_copies_backward(dout_AD, rows_RD, ctx.row_AK, weight_AK)
        ctx.trip.release(moving)
        return drows_RD, dweight_AK, None, None


class _Returned(torch.autograd.Function):
    """Sums came home. Backward starts the way out of the output's gradient."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, trip: Trip[Any], moving: Any) -> Tensor:
        """Wait and sum over ranks."""
        ctx.trip, ctx.like = trip, link
        out_TD: Tensor = trip.receive_home(moving)[0]
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Start the way out."""
        ctx.trip.backward = ctx.trip.send_out(grads[0])
        return torch.zeros_like(ctx.like), None, None
