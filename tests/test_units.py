"""Numbers are printed short, without exponents and with the right prefix."""

from __future__ import annotations

import pytest

from benthic import units


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (units.count(671_026_419_200), "671 B"),
        (units.count(36_625_618_432), "36.63 B"),
        (units.count(1_026_408_232_448), "1.026 T"),
        (units.count(12), "12"),
        (units.size(70_272), "70.27 kB"),
        (units.size(0), "0 B"),
        (units.binary_bytes(4_718_592), "4.5 MiB"),
        (units.flops(250.46e9), "250.5 GFLOP"),
        (units.rate(3.35e12, "B"), "3.35 TB/s"),
        (units.seconds(19.926), "19.9 s"),
        (units.seconds(250e-6), "250 µs"),
        (units.seconds(54.2 * 86400), "54.2 d"),
        (units.seconds(3e-9), "3 ns"),
        (units.seconds(0), "0 s"),
        (units.percent(0.3894), "38.9%"),
        (units.size(-2048), "-2.048 kB"),
        (units.plural(1, "rank"), "1 rank"),
        (units.plural(2048, "rank"), "2048 ranks"),
        (units.plural(0, "microbatch"), "0 microbatches"),
        (units.plural(2, "copy"), "2 copies"),
    ],
)
def test_numbers_read_well(got, text):
    assert got == text
