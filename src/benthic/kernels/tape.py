"""Record the calls of one forward pass on a CPU and make them again without Python between them.

What a CUDA graph is on a GPU: for a few rows the interpreter costs more than the arithmetic, and a decode
step of one batch size makes the same calls on the same shapes every time. While a tape is recorded, a
dispatch mode sees every torch operation. Views and allocations pass (the tape keeps their memory); the
operations in `HANDLERS` become calls into `native_c`; calls that the ops of this room make into it are noted
as they are; anything else is refused, since it would not happen again on replay. Inputs are tensors that the
caller overwrites in place before each replay.
"""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benthic.errors import BackendError
from benthic.kernels.constants import Constants, Weight
from benthic.kernels.native import RECORDER, Call, built, library, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

aten = torch.ops.aten

VIEWS = {
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,  # noqa: SLF001 (what torch calls a reshape that copies nothing)
}
"""They compute nothing, so nothing is to be done again."""


class Tape:
    """The calls of one forward pass and the memory they use.

    Attributes:
        outputs: what the recorded function returned; every replay fills it anew.
    """

    def __init__(self, outputs: Any, recorder: _Recorder) -> None:
        self.outputs = outputs
        self._library = built()
        self._names = [call.name for call in recorder.calls]
        self._calls = self._library.listed(recorder.calls)
        self._made = recorder.made
        self._read = (recorder.read, recorder.constants)

    @property
    def num_bytes(self) -> int:
        """Memory of the intermediate results, which the tape keeps; inputs and parameters not counted."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._made}
        return sum(storage.nbytes() for storage in storages.values())

    def __len__(self) -> int:
        """How many calls a replay makes."""
        return len(self._names)

    def replay(self) -> Any:
        """Make the calls again, with torch's number of threads, and return the outputs."""
        self._library.run(self._calls, 0, len(self))
        return self.outputs

    def profile(self, clock: Callable[[], float], repeats: int = 100) -> dict[str, float]:
        """Mean seconds of one replay by function, greatest first, on the inputs as they are.

        Every call is made by itself, which adds about a microsecond to each.
        """
        spent: defaultdict[str, float] = defaultdict(float)
        for _ in range(repeats):
            for i, name in enumerate(self._names):
                began = clock()
                self._library.run(self._calls, i, 1)
                spent[name] += clock() - began
        ordered = sorted(spent.items(), key=itemgetter(1), reverse=True)
        return {name: seconds / repeats for name, seconds in ordered}


def record(function: Callable[[], Any], constants: Constants) -> Tape:
    """Run `function` once, in inference mode, and keep its calls.

    Args:
        function: computes with the public ops and with the torch operations named in `HANDLERS`.
        constants: the parameters. What is rearranged from them alone is rearranged once, not on every replay.

    Cost: tens of milliseconds.

    Raises:
        BackendError: it does something that a replay would not repeat; the operation is named.
    """
    recorder = _Recorder(constants)
    token = RECORDER.set(recorder)
    try:
        with torch.inference_mode(), _Capture(recorder):
            outputs = function()
    finally:
        RECORDER.reset(token)
    return Tape(outputs, recorder)


class _Recorder:
    """Stands where the library stands: makes each call and notes it, on weights in panels where it can."""

    def __init__(self, constants: Constants) -> None:
        self.calls: list[Call] = []
        self.made: list[Tensor] = []
        self.read: list[Tensor] = []
        self.constants = constants
        self._library = built()

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> None:
            self.calls.append(Call(name, pack(name, arguments)))
            function(*arguments)

        return call

    def linear(self, *arguments: int) -> None:
        """`linear` of `product.c`."""
        x, x_stride, w, w_stride, out, rows, inner, outer = arguments
        panels = self.constants.panels(Weight(w, 0, w_stride, 1, 1, inner, outer))
        if panels is not None:
            w, w_stride = panels.address, 0
        self.__getattr__("linear")(x, x_stride, w, w_stride, out, rows, inner, outer)

    def grouped_linear(self, *arguments: int) -> None:
        """`grouped_linear` of `product.c`."""
        x, w, w_expert, w_stride, ends, out, rows, experts, inner, outer = arguments
        panels = self.constants.panels(Weight(w, w_expert, w_stride, 1, experts, inner, outer))
        if panels is not None:
            (w, w_expert), w_stride = panels, 0
        self.__getattr__("grouped_linear")(x, w, w_expert, w_stride, ends, out, rows, experts, inner, outer)


class _Capture(TorchDispatchMode):
    """Lets views through, turns the handled operations into native calls, refuses the rest."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to hide a mode from its compiler, torch loads the compiler, and nothing is compiled here."""
        return False

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            found = handler(self._recorder, *args, **kwargs)
            self._recorder.made.append(found)
        elif func is aten.empty.memory_format:
            found = func(*args, **kwargs)
            self._recorder.made.append(found)
        elif func in VIEWS:
            found = func(*args, **kwargs)
        else:
            with self:  # what a composite operation is made of comes back here, one by one
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is NotImplemented:
                known = ", ".join(sorted(map(str, HANDLERS)))
                msg = f"a tape cannot repeat {func}: it knows {known}, views and the native ops"
                raise BackendError(msg)
            return decomposed
        self._recorder.read.extend(value for value in _flat(args) if isinstance(value, torch.Tensor))
        return found


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _need(condition: bool, what: str) -> None:  # noqa: FBT001 (reads as an assertion)
    if not condition:
        msg = f"a tape cannot repeat {what}"
        raise BackendError(msg)


def _need_float(*tensors: Tensor) -> None:
    for tensor in tensors:
        _need(
            tensor.dtype == torch.float32 and tensor.device.type == "cpu",
            f"{tensor.dtype} on {tensor.device}",
        )


def _add(_recorder: _Recorder, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    _need_float(a, b)
    _need(
        a.shape == b.shape and a.is_contiguous() and b.is_contiguous() and alpha == 1, "a sum that broadcasts"
    )
    out = torch.ops.aten.empty_like.default(a)
    library().add(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel())
    return out


def _multiply(_recorder: _Recorder, a: Tensor, b: Tensor | float) -> Tensor:
    """Positions times frequencies, or a scaling."""
    if isinstance(b, torch.Tensor) and b.dim():
        integers = a.dtype == torch.int64 and a.dim() == 2 and a.shape[1] == 1 and b.dim() == 1
        _need(
            integers and a.stride(0) == 1 and b.is_contiguous(),
            "a product other than positions times frequencies",
        )
        out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32)
        library().outer(a.data_ptr(), b.data_ptr(), out.data_ptr(), *out.shape)
        return out
    _need_float(a)
    _need(a.is_contiguous(), "a scaling of strided memory")
    out = torch.empty(a.shape, dtype=torch.float32)
    library().scale(a.data_ptr(), float(b), out.data_ptr(), a.numel())
    return out


def _elementwise(name: str) -> Callable[[_Recorder, Tensor], Tensor]:
    def handler(_recorder: _Recorder, a: Tensor) -> Tensor:
        _need_float(a)
        _need(a.is_contiguous(), f"{name} of strided memory")
        out = torch.empty(a.shape, dtype=torch.float32)
        getattr(library(), name)(a.data_ptr(), out.data_ptr(), a.numel())
        return out

    return handler


def _embedding(_recorder: _Recorder, weight: Tensor, tokens: Tensor, *_options: Any) -> Tensor:
    _need_float(weight)
    _need(tokens.dtype == torch.int64 and tokens.is_contiguous(), "an embedding of other than int64 tokens")
    out = torch.empty((tokens.numel(), weight.shape[1]), dtype=torch.float32)
    library().embedding(
        weight.data_ptr(),
        *weight.stride(),
        tokens.data_ptr(),
        out.data_ptr(),
        tokens.numel(),
        weight.shape[1],
    )
    return out


def _bmm(recorder: _Recorder, x: Tensor, w: Tensor) -> Tensor:
    """The result lies row by row with the batches of a row side by side, as heads of a token do."""
    _need_float(x, w)
    batch, rows, inner = x.shape
    panels = recorder.constants.panels(Weight(w.data_ptr(), *w.stride(), *w.shape))
    _need(
        panels is not None or w.stride(2) == 1,
        "a product with neither a parameter nor columns side by side",
    )
    out = torch.empty((rows, batch, w.shape[2]), dtype=torch.float32).transpose(0, 1)
    library().bmm(
        x.data_ptr(),
        *x.stride(),
        *(panels or (w.data_ptr(), w.stride(0))),
        w.stride(1) if panels is None else 0,
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        batch,
        rows,
        inner,
        w.shape[2],
    )
    return out


def _mm(recorder: _Recorder, x: Tensor, w: Tensor) -> Tensor:
    return _bmm(recorder, x.unsqueeze(0), w.unsqueeze(0)).squeeze(0)


def _linear(recorder: _Recorder, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _need(bias is None, "a bias")
    return _mm(recorder, x, weight.t())


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.cos.default: _elementwise("cosine"),
    aten.sin.default: _elementwise("sine"),
    aten.embedding.default: _embedding,
    aten.bmm.default: _bmm,
    aten.mm.default: _mm,
    aten.linear.default: _linear,
}
"""Torch operations that a tape turns into calls of its own."""
