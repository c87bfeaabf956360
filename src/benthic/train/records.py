"""What a run writes line by line: losses, evaluations, expert loads; cut back to the step it resumes from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from benthic.sched.pipeline.spans import write_spans
from benthic.train.balance import max_vio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benthic.sched.pipeline.spans import Span
    from benthic.train.evaluate import Evaluation
    from benthic.train.speed import Speed
    from benthic.train.stragglers import Slowest
    from benthic.train.trainer import StepResult

METRICS: Final = "metrics.jsonl"
EVALUATIONS: Final = "evaluations.jsonl"
LOADS: Final = "loads.jsonl"
SPANS: Final = "spans.jsonl"


@dataclass(frozen=True)
class Records:
    """The JSON-lines files of a run folder; every line has a `step`."""

    folder: Path

    def resume(self, step: int) -> None:
        """Forget every line after `step`, and a last line that a killed process left unfinished."""
        for name in (METRICS, EVALUATIONS, LOADS, SPANS):
            path = self.folder / name
            if path.is_file():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _upto(line, step)]
                replacement = path.with_suffix(".tmp")
                replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                replacement.replace(path)

    def step(self, result: StepResult, speed: Speed, slowest: Slowest | None = None) -> None:
        """One step's losses and speed, and which rank was the slowest where that was measured."""
        line = {
            "step": result.step,
            "loss": result.loss,
            "mtp_loss": list(result.mtp),
            "balance": result.balance,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": result.tokens,
            "skipped": result.skipped,
            "max_vio": {str(layer): max_vio(count) for layer, count in result.counts.items()},
            "tps": speed.tokens_per_second,
            "mfu": speed.mfu,
        }
        if slowest is not None:
            line["slowest"] = asdict(slowest)
        self._append(METRICS, line)

    def loads(self, result: StepResult) -> None:
        """How many tokens each expert got in this step, by layer."""
        counts = {str(layer): count.tolist() for layer, count in result.counts.items()}
        self._append(LOADS, {"step": result.step, "counts": counts})

    def spans(self, spans: Sequence[Span]) -> None:
        """When each pipeline slot of a step ran."""
        with (self.folder / SPANS).open("a", encoding="utf-8") as file:
            file.write(write_spans(spans))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """One pass over the held-out documents."""
        self._append(EVALUATIONS, {"step": step, **asdict(evaluation)})

    def read(self, name: str) -> list[dict[str, Any]]:
        """Every line of one of the files."""
        path = self.folder / name
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _upto(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
