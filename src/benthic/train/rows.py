"""How many rows a step has, and the pipeline table that they run through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.errors import ConfigError
from benthic.parallel.setup import number
from benthic.sched.pipeline import schedules
from benthic.sched.pipeline.check import check

if TYPE_CHECKING:
    from benthic.sched.pipeline.table import Table
    from benthic.train.config import RunConfig


def rows_at(config: RunConfig, tokens: int) -> int:
    """Rows of the step that starts after `tokens` tokens.

    A curve's value is rounded down to whole microbatches on every data rank, as many as the schedule can
    divide.

    Raises:
        ConfigError: that leaves none.
    """
    loop, layout = config.train, config.layout
    if loop.batch_curve is None:
        return number(loop.global_batch_size)
    microbatches = schedules.unit(layout.schedule, layout.pp_degree)
    unit = layout.dp_degree * number(loop.local_batch_size) * microbatches
    wanted = int(loop.batch_curve.at(tokens))
    if wanted < unit:
        message = (
            f"train.batch_curve wants {wanted} rows after {tokens} tokens, but layout.dp_degree="
            f"{layout.dp_degree}, train.local_batch_size={loop.local_batch_size} and schedule "
            f"{layout.schedule!r} take multiples of {unit}. Start with {unit} or more."
        )
        raise ConfigError(message)
    return wanted // unit * unit


def planned_tokens(config: RunConfig) -> int:
    """Tokens of the whole run."""
    seq_len, seen = number(config.train.seq_len), 0
    if config.train.batch_curve is None:
        return config.train.steps * rows_at(config, 0) * seq_len
    for _ in range(config.train.steps):
        seen += rows_at(config, seen) * seq_len
    return seen


def table_of(config: RunConfig, rows: int) -> Table:
    """The pipeline schedule of a step of `rows` rows.

    Raises:
        ConfigError: the schedule does not exist for these numbers.
    """
    layout, loop = config.layout, config.train
    microbatches = rows // (layout.dp_degree * number(loop.local_batch_size))
    table = schedules.build(
        layout.schedule, layout.pp_degree, microbatches, virtual_stages=layout.virtual_stages
    )
    check(table)
    return table
