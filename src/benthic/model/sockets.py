"""The three sockets through which everything that varies enters the network.

`attend`    how queries meet keys: packed causal for training, the paged latent cache for serving.
`exchange`  how tokens reach experts: on this device, through all-to-all, through NVLink kernels.
`linear`    what precision a matrix product has.

The network knows nothing else about ranks, pages or precision. Shape suffixes of this package: T tokens,
D model, H heads, n nope dim, r rope dim, v value dim, C kv latent, Q query latent, E experts, K top-k,
R routed rows (sorted by expert), F ffn, V vocabulary; I and O are the in and out dims of any matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from benthic.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.kernels.ops import Slots
    from benthic.kernels.reference.moe import RowMaps

T = TypeVar("T")


class LatentUp(Protocol):
    """The up-projection of the kv latent (W^UK and W^UV of one layer), in both of its uses."""

    def expand(self, latent_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head: `(k_nope_THn, v_THv)`."""
        ...

    def absorb_query(self, q_nope_THn: Tensor) -> Tensor:
        """Queries moved into the latent space, `q_THC`, so that keys need no expansion."""
        ...

    def absorb_value(self, out_THC: Tensor) -> Tensor:
        """Attention outputs moved from the latent space to value heads, `out_THv`."""
        ...


class Attend(Protocol):
    """How queries meet keys."""

    def slots(self, layer: int) -> Slots | None:
        """Where the layer's latents and rotated keys are written before it attends; None: nowhere."""
        ...

    def __call__(
        self,
        q_nope_THn: Tensor,
        q_rope_THr: Tensor,
        latent_TC: Tensor,
        k_rope_Tr: Tensor,
        up: LatentUp,
        *,
        layer: int,
        scale: float,
    ) -> Tensor:
        """Return `out_THv`; `latent_TC` is normed and both `rope` operands are already rotated.

        Latents and keys have no rows where `slots` said that they are read from there alone.
        """
        ...


class Mixture(Protocol):
    """Experts that are all here, whole: copies of tokens go to them and come back summed."""

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, beside: tuple[Tensor, ...]
    ) -> Tensor:
        """`sum_k weight_tk expert_k(x_t)`, added to the sum of `beside`: `out_TD`."""
        ...


class Linear(Protocol):
    """What precision a matrix product has: called for one weight, `grouped` for one weight per expert."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T` in the precision this socket stands for."""
        ...

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`; rows past `ends_E[-1]` come out as zero."""
        ...

    def together(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG002
        """The products of `x` with each weight by a single one, if the weights lie in memory as one does."""
        return None

    def network(self, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """`down(swiglu(gate_up(x_RD)))`: of `[2F, D]` and `[D, F]`, or with ends of such for each expert."""
        hidden_RF = ops.swiglu(self.product(x_RD, gate_up, ends_E))
        return self.product(hidden_RF, down, ends_E)

    def mixture(self, gate_up: Tensor, down: Tensor) -> Mixture | None:  # noqa: ARG002 (of some weights alone)
        """These experts as one step with the copying before it and the summing behind it, if there is one."""
        return None

    def renew(self) -> None:
        """Weights have changed: make anew what is kept of them, before somebody waits for it."""
        return  # most sockets keep nothing

    def recorded(self, *, begin: bool) -> None:  # noqa: ARG002 (see there)
        """Recorded steps make what is kept of weights themselves from here on: forget it, and leave theirs.

        Not `begin`: there is no such step any more.
        """
        return  # most sockets keep nothing

    def product(self, x_RI: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
        """The product of one weight, or with ends that of one weight per expert."""
        return self(x_RI, weight) if ends_E is None else self.grouped(x_RI, weight, ends_E)


@dataclass(frozen=True)
class InFlight:
    """A transfer that was started and not yet waited for.

    Attributes:
        tensors: all through which gradients flow; whoever cuts the graph between two phases cuts these.
        handle: the exchange's own.
        at_home: nothing travels. A dispatch then holds tokens and their weights, with `expert_TK` as its
            handle, and all experts are here; a combine holds the sum itself.
    """

    tensors: tuple[Tensor, ...]
    handle: Any
    at_home: bool = False


@dataclass(frozen=True)
class LateSum:
    """A residual stream that the norm behind it sums, in one pass: see `benthic.kernels.ops.unpermute_norm`.

    Attributes:
        rows_RD: experts' rows, each with its token's place in `maps` and its weight.
        beside: what they are added to.
    """

    rows_RD: Tensor
    maps: RowMaps
    weight_TK: Tensor
    beside: tuple[Tensor, ...]

    def summed(self) -> Tensor:
        """The stream itself."""
        return ops.unpermute(self.rows_RD, self.maps, self.weight_TK, self.beside)

    def normed(self, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Its norm, and the stream itself."""
        return ops.unpermute_norm(self.rows_RD, self.maps, self.weight_TK, self.beside, weight_D, eps)


Stream: TypeAlias = "Tensor | LateSum"
"""A residual stream, [tokens, hidden_size]."""


def summed(stream_TD: Stream) -> Tensor:
    """The residual stream, summed where it is not yet."""
    return stream_TD.summed() if isinstance(stream_TD, LateSum) else stream_TD


@dataclass(frozen=True)
class Arrived:
    """Rows at this rank's experts.

    Attributes:
        rows_RD: sorted by local expert.
        ends_E: int32 [local experts], where each expert's rows end; rows past the last end mean nothing.
        weight: float32, the weights that travelled with the rows, for `start_combine`.
        handle: the exchange's own.
    """

    rows_RD: Tensor
    ends_E: Tensor
    weight: Tensor
    handle: Any


class Exchange(Protocol):
    """How tokens reach their experts and come back: a way starts in one phase and is finished in the next.

    Between start and finish something else may be computed. Every rank of an exchange makes the same calls
    in the same order. Gradients flow to `x_TD`, `rows_RD`, `weight_TK` and `beside`.
    """

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """Send every token, and the weights of its choice, to the ranks of its experts; none is dropped."""
        ...

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Wait for the tokens that come here and sort a copy of each to each of its experts here."""
        ...

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """Weigh the experts' rows and send them home; `beside` is what they are added to there.

        Where autograd records, no more than one tensor waits for them in the flight.
        """
        ...

    def finish_combine(self, flight: InFlight) -> Tensor:
        """Wait for what comes home and sum it in a fixed order: `out_t = sum_k weight_tk expert_k(x_t)`.

        Added to the sum of `beside`, see `benthic.kernels.ops.added`.
        """
        ...


class Aside(Protocol):
    """When work happens that nothing depends on until its result is taken; results are the same."""

    def moment(self, rows_an_expert: float) -> Any:
        """Now, for shared experts' work that is known later: it may begin beside what comes in between.

        `rows_an_expert`, on average, decide whether that pays. No result of earlier side work may be given
        up in between.
        """
        ...

    def __call__(self, work: Callable[[], T], since: Any = None) -> Callable[[], T]:
        """Start `work`, from a moment on or from now on.

        What is returned takes its result, and is called before any operand is given up.
        """
        ...


class AtOnce:
    """Work first, then whatever follows."""

    def moment(self, rows_an_expert: float) -> None:
        """Work begins when it is given."""

    def __call__(self, work: Callable[[], T], since: None = None) -> Callable[[], T]:  # noqa: ARG002
        """See `Aside`."""
        result = work()
        return lambda: result


at_once = AtOnce()


@dataclass(frozen=True)
class Sockets:
    """The three choices that a forward pass is given, and when a block's side work happens.

    `late` makes of a combine's flight what the next norm sums; None: a block ends with its sum.
    """

    attend: Attend
    exchange: Exchange
    linear: Linear
    aside: Aside = at_once
    late: Callable[[InFlight], LateSum] | None = None
