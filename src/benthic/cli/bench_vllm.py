"""Words of `vllm bench serve` on our command line: its names of the result file, notes and remedies."""

from __future__ import annotations

from collections import deque
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand

from benthic.cli.serve_vllm import spelled
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

METRICS: Final = frozenset({"ttft", "tpot", "itl", "e2el"})
"""What `--percentile-metrics` can ask for; percentiles of all of them are reported."""

_FIELD = "Use --extra-body, as --extra-body '{\"temperature\": 0}'."

REMEDIES: Final = {
    **dict.fromkeys(("--temperature", "--top-p", "--top-k", "--min-p", "--logprobs"), _FIELD),
    "--append-result": "Repeat --request-rate: all rates go into one --result FILE.",
    "--label": "Name the file after it: --result FILE.",
    "--metadata": "Name the file after it: --result FILE. Machine, versions, commit and command are in it.",
}
"""Flags of vLLM's that are not here, and what to do instead."""


class BenchServeCommand(TyperCommand):
    """`benthic bench serve`, which understands the words of `vllm bench serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, in our own words."""
        return super().parse_args(ctx, translate(args))


def translate(words: Sequence[str]) -> list[str]:
    """A command line in our own words.

    Raises:
        ConfigError: a flag of vLLM's that is not here, or `--save-result` and `--result-dir` without a name.
    """
    left, ours = deque(words), list[str]()
    file: dict[str, str] = {}
    while left:
        flag, equals, value = spelled(left.popleft())
        if flag in REMEDIES:
            msg = f"{flag} is a flag of vLLM's. {REMEDIES[flag]}"
            raise ConfigError(msg)
        if flag in {"--result-filename", "--result-dir", "--percentile-metrics"} and not equals:
            value = left.popleft() if left else ""
        if flag == "--percentile-metrics":
            _check_metrics(value)
        elif flag in {"--result-filename", "--result-dir", "--save-result"}:
            file[flag] = value
        else:
            ours.append(f"{flag}{equals}{value}")
    return ours + _result(file, named=any(spelled(word)[0] == "--result" for word in ours))


def _check_metrics(value: str) -> None:
    """Say that the flag changes nothing. Raises: ConfigError for what is not measured."""
    unknown = set(value.split(",")) - METRICS
    if unknown:
        msg = (
            f"--percentile-metrics {value}: percentiles of {', '.join(sorted(METRICS))} are reported. "
            "Leave it out."
        )
        raise ConfigError(msg)
    typer.echo(f"note: --percentile-metrics {value} changes nothing here", err=True)


def _result(file: dict[str, str], *, named: bool) -> list[str]:
    """The words that name the file which vLLM's flags ask for."""
    name = file.get("--result-filename")
    if name and not named:
        return ["--result", str(PurePath(file.get("--result-dir", "")) / name)]
    others = sorted(file.keys() - {"--save-result"}) if named else sorted(file)
    if others:
        msg = f"{' and '.join(others)}: name one file to write. Use --result FILE."
        raise ConfigError(msg)
    return []
