"""What an engine adds to its kernels' prices, from a few measured steps of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import DataError
from benthic.plan.serving.priced import TUNED, Curve, Engine, PricedStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.plan.serving.steps import StepLoad


_PRICES: Final = 0.1
_STEPS: Final = 0.05
_PRIOR: Final = (_STEPS / _PRICES) ** 2
_KEPT: Final = 1.0 / (1.0 + _PRIOR)
_OVERLAP_STEPS: Final = 3  # fewer cannot tell overlap from prices that are too high


class MeasuredStep(NamedTuple):
    """One step and its seconds; `recorded` as a CUDA graph, or launched kernel by kernel."""

    load: StepLoad
    seconds: float
    recorded: bool = False


def fit_engine(name: str, step: PricedStep, measured: Sequence[MeasuredStep]) -> Engine:
    """Gap a layer and stretch of the kernels that fit decode steps best; relative squares, prices given.

    Prices are taken to be within `_PRICES` of the kernels and steps to repeat within `_STEPS`, so that the
    stretch leaves 1 only as far as the steps insist. The gap of decode steps is negative where kernels
    overlap; a negative one of steps with prompts is 0, and the stretch alone is fitted.
    Steps with prompts that are no graphs are the host's up to some size, and the device's from there on. If
    any are graphs, steps with up to the most rows of those are taken to be, and what the lines leave
    is kept as curves over rows, for prompts alone and for prompts beside decodes.

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
    prompts = [each for each in measured if each.load.prefill_tokens]
    rows = max((each.load.tokens for each in prompts if each.recorded), default=0)
    plain = replace_engine(step, replace(TUNED, graph_rows=rows))
    layers = step.model.num_hidden_layers
    line = best_line if len(decodes) >= _OVERLAP_STEPS else non_negative_line
    gap, stretch = line([(plain([each.load]), each.seconds) for each in decodes], prior=_PRIOR)
    launched = [(plain([each.load]), each.seconds) for each in prompts if not each.recorded]
    recorded = [(plain([each.load]), each.seconds) for each in prompts if each.recorded]
    host, prompt_stretch = _longer(launched)
    prompt_gap = 0.0
    if recorded:
        long = [pair for pair in launched if pair[0] > host]
        prompt_gap, prompt_stretch = non_negative_line([*recorded, *long], prior=_PRIOR)
    line_only = Engine(
        name=name,
        eager_layer_s=host / layers,
        graph_layer_s=gap / layers,
        stretch=stretch,
        prompt_stretch=prompt_stretch,
        prompt_layer_s=prompt_gap / layers,
        graph_rows=rows,
    )
    fitted = replace_engine(step, line_only)
    graphs = [each for each in prompts if each.recorded]
    return replace(
        line_only,
        curve=_curve(fitted, decodes),
        prompt_curve=_curve(fitted, [each for each in graphs if not each.load.decodes]),
        mixed_curve=_curve(fitted, [each for each in graphs if each.load.decodes]),
    )


def _curve(fitted: PricedStep, steps: Sequence[MeasuredStep]) -> Curve:
    """What steps took over what the lines foretell, by their rows with padding; the likely part of it.

    Of a difference some is the measurement's: the less, the more prices may be off than steps repeat.
    """
    found: dict[int, list[float]] = defaultdict(list)
    for each in steps:
        found[fitted.rank(each.load).tokens].append(each.seconds / fitted([each.load]))
    return tuple((float(rows), fmean(shares) ** _KEPT) for rows, shares in sorted(found.items()))


def left_out(name: str, step: PricedStep, measured: Sequence[MeasuredStep]) -> list[float]:
    """Relative error of each step's time as an engine foretells it that was fitted to all the others."""
    errors = []
    for each in measured:
        others = [other for other in measured if other is not each]
        engine = fit_engine(name, step, others)
        rows = max(engine.graph_rows, each.load.tokens) if each.recorded else 0
        foretold = replace_engine(step, replace(engine, graph_rows=rows))([each.load])
        errors.append(foretold / each.seconds - 1.0)
    return errors


def replace_engine(step: PricedStep, engine: Engine) -> PricedStep:
    """The same steps under another engine."""
    return PricedStep(step.model, step.layout, step.machine, engine)


def best_line(pairs: Sequence[tuple[float, float]], *, prior: float = 0.0) -> tuple[float, float]:
    """`a` and `b` >= 0 of `y = a + b x`: least squares of `(a + b x - y) / y`, and `prior` of `(b - 1)^2`."""
    w = [1.0 / (y * y) for _, y in pairs]
    s = sum(w)
    sx = sum([wi * x for wi, (x, _) in zip(w, pairs, strict=True)])
    sy = sum([wi * y for wi, (_, y) in zip(w, pairs, strict=True)])
    sxx = sum([wi * x * x for wi, (x, _) in zip(w, pairs, strict=True)]) + prior
    sxy = sum([wi * x * y for wi, (x, y) in zip(w, pairs, strict=True)]) + prior
    b = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    return ((sy - b * sx) / s, b) if b >= 0.0 else (sy / s, 0.0)


def non_negative_line(pairs: Sequence[tuple[float, float]], *, prior: float = 0.0) -> tuple[float, float]:
    """`best_line`, with `a` >= 0."""
    a, b = best_line(pairs, prior=prior)
    if a >= 0.0:
        return a, b
    shares = [x / y for x, y in pairs]
    return 0.0, (sum(shares) + prior) / (sum([share * share for share in shares]) + prior)


def _longer(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """`h` >= 0 and `b` of `y = max(h, b x)`: the split of the `x` in order that leaves the least squares.

    What `h` explains is longer than its price by twice what prices may be off.
    """
    ordered = sorted(pairs)
    slow = 0
    while slow < len(ordered) and ordered[slow][1] > (1 + 2 * _PRICES) * ordered[slow][0]:
        slow += 1
    found = [_split(ordered[:count], ordered[count:]) for count in range(slow + 1)]
    return min(found, key=lambda each: _left(each, ordered))


def _split(flat: Sequence[tuple[float, float]], rising: Sequence[tuple[float, float]]) -> tuple[float, float]:
    host = sum([1.0 / y for _, y in flat]) / sum([1.0 / (y * y) for _, y in flat]) if flat else 0.0
    shares = [x / y for x, y in rising]
    return host, (sum(shares) + _PRIOR) / (sum([share * share for share in shares]) + _PRIOR)


def _left(found: tuple[float, float], pairs: Sequence[tuple[float, float]]) -> float:
    host, stretch = found
    left = sum([(max(host, stretch * x) / y - 1.0) ** 2 for x, y in pairs])
    return left + _PRIOR * (stretch - 1.0) ** 2
