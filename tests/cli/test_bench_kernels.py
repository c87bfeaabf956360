from __future__ import annotations

import io

from rich.console import Console

from benthic.cli.bench_kernels import drawn
from benthic.kernels.bench.table import Row
from benthic.kernels.bench.timing import Line


def test_the_table_cuts_no_name_at_80_columns() -> None:
    line = Line("add_rms_norm backward", "32768x7168", "torch_autograd", 80.7, 0.001, "TB/s", None)
    written = io.StringIO()
    Console(file=written, width=80).print(drawn([Row(line.op, line.shape, line.unit, None, line, 0.0022)]))
    letters = "".join(written.getvalue().split())
    assert "…" not in letters
    assert "autograd" in letters
