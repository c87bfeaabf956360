"""`benthic doctor`: what this machine has, and which implementation of every op will run here and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benthic import __version__
from benthic.errors import ConfigError, UnknownFieldError
from benthic.units import binary_bytes, plural

if TYPE_CHECKING:
    from benthic.kernels.ops import Choice

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "fastapi", "datasets", "tokenizers")
DTYPES = ("float32", "bfloat16", "float16")


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: for which to explain the ops.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    verbose: Annotated[  # noqa: FBT002 (a flag on the command line)
        bool, typer.Option("--verbose", "-v", help="Also say why the others were not chosen.")
    ] = False,
) -> None:
    """Say what is installed, which devices there are and what every op will run.

    Example: benthic doctor --device cuda --dtype bfloat16
    """
    console = Console()
    console.print(_versions())
    if importlib.util.find_spec("torch") is None:
        console.print(
            "torch is not installed: plan and draw work; model, train and serve need `benthic[model]`."
        )
        return
    console.print(_devices())
    device, dtype = _resolved(device, dtype)
    console.print(_ops(device, dtype, verbose=verbose))


def _versions() -> Table:
    table = Table("package", "version", title=f"benthic {__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        table.add_row(package, version)
    return table


def _devices() -> Table:
    import torch  # noqa: PLC0415 (this command also runs where torch is not installed)

    table = Table("device", "what", "memory", title="Devices")
    threads = plural(torch.get_num_threads(), "thread")
    table.add_row("cpu", f"{threads}, {torch.backends.cpu.get_cpu_capability()}", "")
    for index in range(torch.cuda.device_count()):
        found: Any = torch.cuda.get_device_properties(index)
        what = f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors"
        table.add_row(f"cuda:{index}", what, binary_bytes(found.total_memory))
    return table


def _resolved(device: str, dtype: str) -> tuple[str, str]:
    """Replace `auto`: the GPU if there is one, and the dtype that models use there."""
    import torch  # noqa: PLC0415 (this command also runs where torch is not installed)

    _known("device", device, ("auto", "cpu", "cuda"))
    _known("dtype", dtype, ("auto", *DTYPES))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        msg = (
            "the cuda column needs Triton to say what it would run; install `triton`, or ask for --device cpu"
        )
        raise ConfigError(msg)
    return device, dtype


def _known(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownFieldError(kind, name, known)


def _ops(device: str, dtype: str, *, verbose: bool) -> Table:
    import torch  # noqa: PLC0415 (this command also runs where torch is not installed)

    from benthic.kernels import ops  # noqa: PLC0415 (imports torch)

    table = Table(
        "op",
        "runs",
        "why",
        title=f"Ops on {device} in {dtype}",
        caption="inference; training too, where no line of its own says otherwise",
    )
    for choice in ops.explain(device, getattr(torch, dtype)):
        table.add_row(choice.op, choice.implementation, choice.reason)
        for name, reason in _others(choice, verbose=verbose):
            table.add_row("", f"[dim]{name}[/]", f"[dim]{reason}[/]")
    return table


def _others(choice: Choice, *, verbose: bool) -> tuple[tuple[str, str], ...]:
    return choice.others if verbose else ()
