"""`benthic plan examples`: numbers of lectures and papers, worked out anew."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding


def examples() -> None:
    """Print worked examples: formula, number, what the source prints, and where they disagree."""
    from benthic.plan.serving.examples import examples as serving_examples  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.training import examples as training  # noqa: PLC0415

    console = Console(highlight=False, markup=False)
    for one in (*training.examples(), *serving_examples()):
        console.print(one.topic, style="bold")
        for line in (one.formula, one.value, f"printed: {one.printed} ({one.source})", one.note):
            if line:
                console.print(Padding(line, (0, 0, 0, 2)))
