"""When requests arrive: open-loop arrival processes, a pure function of their seed.

The same seed gives the same sequence of gaps at every rate, divided by the rate: two rates differ in speed
alone, which is what a search for the highest sustainable rate needs.
"""

from __future__ import annotations

import itertools
import math
import random

from benthic.errors import ConfigError


def arrival_times(count: int, *, rate: float, burstiness: float = 1.0, seed: int = 0) -> tuple[float, ...]:
    """Seconds at which `count` requests arrive, the first one gap after 0, the last at `count / rate`.

    Gaps are gamma distributed with shape `burstiness` and mean `1 / rate`: 1 is a Poisson process, less is
    burstier (squared coefficient of variation 1 / burstiness), more is steadier. An infinite rate puts every
    arrival at 0. The times are stretched so that the last one is where its mean is: a short run at rate 20 is
    then one at rate 20, and not at the 18 that its draw happened to be.

    Args:
        count: how many requests.
        rate: requests a second.
        burstiness: the gamma distribution's shape, as `--burstiness` of vLLM's benchmark.
        seed: of the gaps.
    Raises: ConfigError for a rate or burstiness that is not above 0.
    """
    if not rate > 0.0:
        msg = f"the request rate is {rate}, but it must be above 0 (inf sends everything at once)"
        raise ConfigError(msg)
    if not 0.0 < burstiness < math.inf:
        msg = f"burstiness is {burstiness}, but it must be a finite number above 0 (1 is Poisson)"
        raise ConfigError(msg)
    if math.isinf(rate):
        return (0.0,) * count
    generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    gaps = [generator.gammavariate(burstiness, 1.0 / burstiness) for _ in range(count)]
    unit = count / rate / math.fsum(gaps)
    return tuple(itertools.accumulate(gap * unit for gap in gaps))
