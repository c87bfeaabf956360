"""What autograd keeps, replaced by how to make it again, or moved to the host until then.

A phase of a block runs with hooks on everything that autograd saves. Tensors that the `Keeper` was told how
to rebuild are not kept; the rest is kept as it is, or in host memory. The graph stays what it was, and what
is rebuilt is computed by the same operations from the same operands, so gradients keep every bit; but for
what is kept in fewer bits on request (`fp8_swiglu`, `e5m6_attention`).

A rebuilt tensor lives until the backward of its phase is over. Its cost is that of the operations that made
it, once more.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    Source = Callable[[], Tensor]


class Recipe:
    """How to make a value, which is made once, when first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._value: Any = None

    def value(self) -> Any:
        """The value, made without a graph."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._make()
        return self._value


def as_before(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)` by the operations that autograd would record: others may round differently."""
    with torch.enable_grad():
        return function(*(tensor.detach().requires_grad_() for tensor in tensors)).detach()


@dataclass(frozen=True)
class _Noted:
    """A tensor that can be made again. It is held while its phase runs, so that its memory is its name."""

    tensor: Tensor
    recipe: Recipe


@dataclass(frozen=True)
class _View:
    """A view of a tensor that is made again, by how it lies beside it."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> Tensor:
        whole: Tensor = self.recipe.value()
        if (whole.size(), whole.stride(), self.offset) == (self.size, self.stride, 0):
            return whole
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


@dataclass
class _Saved:
    """What stands in autograd's graph for a tensor; decided when the phase is over."""

    kept: Tensor | _View | _OnHost

    def value(self) -> Tensor:
        return self.kept if isinstance(self.kept, torch.Tensor) else self.kept()


@dataclass(frozen=True)
class _OnHost:
    """A copy in host memory, pinned beside a GPU."""

    tensor: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _OnHost:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor.detach(), non_blocking=True)
        return cls(copy, tensor.device)

    def __call__(self) -> Tensor:
        return self.tensor.to(self.device, non_blocking=True)


@dataclass
class Keeper:
    """Decides what one block keeps of the phase that runs.

    Outside of a phase (when something is rebuilt, say) nothing can be noted and `running` is False.
    """

    running: bool = False
    _offloading: bool = False
    _noted: dict[int, _Noted] = field(default_factory=dict, repr=False)
    _saved: list[tuple[Tensor, _Saved]] = field(default_factory=list, repr=False)
    _staying: set[int] = field(default_factory=set, repr=False)
    _moved: dict[Any, tuple[Tensor, _OnHost]] = field(default_factory=dict, repr=False)
    _shared: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def phase(self, *, offload: bool, staying: Iterator[Tensor]) -> Iterator[None]:
        """Keep what is saved inside; `staying` (parameters) is never offloaded."""
        self.running, self._offloading = True, offload
        if offload:
            self._staying.update(_storage(tensor) for tensor in staying)
        try:
            with saved_tensors_hooks(self._pack, _Saved.value):
                yield
            for tensor, saved in self._saved:
                saved.kept = self._view(tensor) or self._kept(tensor)
        finally:
            self.running = self._offloading = False
            self._saved.clear()
            for found in (self._noted, self._staying, self._moved, self._shared):
                found.clear()

    def note(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Do not keep `tensor`, nor views of it: `make` gives it again, laid out the same."""
        if self.running:
            self._noted[_storage(tensor)] = _Noted(tensor, Recipe(make))

    def note_all(self, parts: tuple[Tensor, ...], again: Recipe) -> None:
        """As `note`, for tensors that are made together; those that were noted stay so."""
        for i, part in enumerate(parts):
            if not self.knows(part):
                self.note(part, lambda i=i: again.value()[i])  # type: ignore[misc]

    def narrow(self, tensor: Tensor, parts: tuple[Tensor, ...], widen: Callable[..., Tensor]) -> None:
        """Keep `parts` instead of `tensor`, which `widen` makes of them."""
        sources, shape = [self.source(part) for part in parts], tensor.shape
        self.note(tensor, lambda: widen(*(source() for source in sources)).view(shape))

    def source(self, tensor: Tensor) -> Source:
        """How to get at the values of `tensor` later; it is kept if there is no other way."""
        view = self._view(tensor)
        if view is not None:
            return view
        kept = self._kept(tensor)
        return kept if isinstance(kept, _OnHost) else lambda: kept

    def knows(self, tensor: Tensor) -> bool:
        """Whether it can be made again."""
        return _storage(tensor) in self._noted

    def stays(self, tensors: tuple[Tensor, ...]) -> None:
        """They are in memory anyway, so moving them frees nothing."""
        if self.running:
            self._staying.update(_storage(tensor) for tensor in tensors)

    def once(self, tensor: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What is made of `tensor`, one for all who ask while the phase runs."""
        if not self.running:
            return make()
        key = _place(tensor)
        if key not in self._shared:
            self._shared[key] = tensor, make()
        return self._shared[key][1]

    def _pack(self, tensor: Tensor) -> _Saved:
        tensor = _alone(tensor)
        saved = _Saved(tensor)
        self._saved.append((tensor, saved))
        return saved

    def _view(self, tensor: Tensor) -> _View | None:
        noted = self._noted.get(_storage(tensor))
        if noted is None:
            return None
        (first, last), (low, high) = _span(tensor), _span(noted.tensor)
        if first < low or last > high:
            return None
        return _View(noted.recipe, tensor.size(), tensor.stride(), first - low)

    def _kept(self, tensor: Tensor) -> Tensor | _OnHost:
        if not self._offloading or _storage(tensor) in self._staying:
            return _alone(tensor)
        key = _place(tensor)
        if key not in self._moved:
            self._moved[key] = tensor, _OnHost.of(tensor)
        return self._moved[key][1]


def _alone(tensor: Tensor) -> Tensor:
    """Without its graph, since a node that holds its own output would hold itself."""
    return tensor.detach() if tensor.requires_grad else tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 (its identity, whatever views it)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element of its memory that a tensor shows."""
    first = int(tensor.storage_offset())
    return first, first + sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))


def _place(tensor: Tensor) -> Any:
    """Equal for views of the same elements alone."""
    return _storage(tensor), tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
