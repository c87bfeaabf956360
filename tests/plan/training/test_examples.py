"""Worked examples give the numbers that the sources print, or say why not."""

from __future__ import annotations

from typer.testing import CliRunner

from benthic.cli import plan
from benthic.plan.training.examples import examples


def test_worked_examples_give_the_sources_numbers():
    value = {one.topic: one.value for one in examples()}
    assert value["scores of one attention layer"] == "549,755,813,888 = 512 Gi elements, 1 TiB in BF16"
    assert value["products of one attention layer"].startswith(
        "281,474,976,710,656 FLOP = 256 TiFLOP, 285 ms"
    )
    assert value["training state, BF16 mixed"].startswith("16 N")
    assert value["training state, FP8, DeepSeek-V3"] == "13 N = 8.723 TB for 671 B"
    assert value["training state, FP8, BF16 grads"].startswith("11 N")
    assert value["DeepSeek-V3 on 2,048 GPUs"] == "2,048 ranks, dense DP 128, expert DP 2"
    assert [value[f"bubble of {name}"].split()[0] for name in ("1f1b", "zb-h1", "dualpipe")] == [
        "21",
        "7",
        "6",
    ]
    assert value["cost of pre-training"] == "$5.328 M"


def test_every_example_that_differs_from_its_source_says_why():
    for one in examples():
        if one.topic.startswith(("scores", "products", "training state, FP8", "DeepSeek-V3 on")):
            assert one.note


def test_the_command_prints_them_all():
    output = CliRunner().invoke(plan.app, ["examples"], env={"COLUMNS": "80"}).output
    for one in examples():
        assert one.value.split()[0] in output.split(), one.topic
    assert "2,664" in output.replace("\n", "")
