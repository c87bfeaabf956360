"""What an engine adds to its kernels' prices, from a few measured steps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import DataError
from benthic.plan.serving.priced import TUNED, Engine, PricedStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.plan.serving.steps import StepLoad


_FLAT: Final = 1e-9  # spread of the priced times below which they are one time


class MeasuredStep(NamedTuple):
    """One step and its seconds."""

    load: StepLoad
    seconds: float


def fit_engine(name: str, step: PricedStep, measured: Sequence[MeasuredStep]) -> Engine:
    """Gap a layer and stretch of the kernels that fit decode steps best; relative squares, prices given.

    A stretch below 1 is an engine whose kernels are faster than those that made the prices: a few rows an
    expert are priced from many. With a single step the gap alone is fitted and the stretch is 1, or less if
    the step is faster than its price; a negative gap is 0 and the stretch alone is fitted. Host seconds of a
    step with prompts in it are what these steps last beyond that.

    Raises:
        DataError: no decode step, or a time that is not above 0.
    """
    decodes = [each for each in measured if not each.load.prefill_tokens]
    if not decodes:
        msg = f"0 of {len(measured)} measured steps decode, but at least 1 is needed. Measure decode steps."
        raise DataError(msg)
    if (shortest := min(each.seconds for each in measured)) <= 0.0:
        msg = f"a measured step takes {shortest} s, but times are above 0. Measure it again."
        raise DataError(msg)
    plain = replace_engine(step, TUNED)
    layers = step.model.num_hidden_layers
    gap, stretch = _line([(plain([each.load]), each.seconds) for each in decodes])
    engine = Engine(name=name, graph_layer_s=gap / layers, stretch=stretch)
    fitted = replace_engine(step, engine)
    prompts = [each for each in measured if each.load.prefill_tokens]
    return replace(engine, eager_layer_s=_rest([(fitted([p.load]), p.seconds) for p in prompts]) / layers)


def left_out(name: str, step: PricedStep, measured: Sequence[MeasuredStep]) -> list[float]:
    """Relative error of each step's time as an engine foretells it that was fitted to all the others."""
    errors = []
    for each in measured:
        others = [other for other in measured if other is not each]
        foretold = replace_engine(step, fit_engine(name, step, others))([each.load])
        errors.append(foretold / each.seconds - 1.0)
    return errors


def replace_engine(step: PricedStep, engine: Engine) -> PricedStep:
    """The same steps under another engine."""
    return PricedStep(step.model, step.layout, step.machine, engine)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """`a` >= 0 and `b` of `y = a + b x`, with least squares of `(a + b x - y) / y`; `b` is 1 for one `x`."""
    w = [1.0 / (y * y) for _, y in pairs]
    s = sum(w)
    sx = sum([wi * x for wi, (x, _) in zip(w, pairs, strict=True)])
    sy = sum([wi * y for wi, (_, y) in zip(w, pairs, strict=True)])
    sxx = sum([wi * x * x for wi, (x, _) in zip(w, pairs, strict=True)])
    sxy = sum([wi * x * y for wi, (x, y) in zip(w, pairs, strict=True)])
    spread = s * sxx - sx * sx
    b = (s * sxy - sx * sy) / spread if spread > _FLAT * s * sxx else 1.0
    a = (sy - b * sx) / s
    return (0.0, sxy / sxx) if a < 0.0 else (a, b)


def _rest(pairs: Sequence[tuple[float, float]]) -> float:
    """`a` >= 0 of `y = a + x`, with least squares of `(a + x - y) / y`; 0 without pairs."""
    weight = sum([1.0 / (y * y) for _, y in pairs])
    return max(0.0, sum([(y - x) / (y * y) for x, y in pairs]) / weight) if pairs else 0.0
