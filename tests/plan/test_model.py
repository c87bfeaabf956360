"""The report on a model adds up, says its rules and fits a terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from benthic.errors import ConfigError
from benthic.plan.model import as_dict, model_report
from benthic.plan.model_tables import tables
from benthic.spec import presets, totals


@pytest.mark.parametrize("name", presets.names())
def test_parts_add_up_to_the_totals(name):
    config = presets.get(name)
    report = model_report(config)
    assert sum(part.total for part in report.parts) == totals.total(config)
    assert sum(part.active for part in report.parts) == totals.active(config, "embedding and head")


def _evaluate(rule: str, config) -> int:
    """A part's formula as arithmetic: juxtaposed factors multiply."""
    letters = {
        "V": config.vocab_size,
        "d": config.hidden_size,
        "H": config.num_attention_heads,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "n": config.qk_nope_head_dim,
        "r": config.qk_rope_head_dim,
        "v": config.v_head_dim,
        "E": config.n_routed_experts,
        "f": config.moe_intermediate_size,
    }
    text = "".join(f" {c} " if c in "()+x" else c for c in rule)
    product = ""
    for token in text.split():
        value = {"x": "*"}.get(token, str(letters.get(token, token)))
        follows = product[-1:].isdigit() or product[-1:] == ")"
        product += ("*" if follows and value[0] not in ")+*" else "") + value
    return eval(product)  # noqa: S307 (digits and operators only)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2", "tiny"])
def test_the_printed_formula_of_each_part_gives_its_total(name):
    config = presets.get(name)
    for part in model_report(config).parts:
        if part.part != "norms":
            assert _evaluate(part.rule, config) == part.total, part


def test_the_report_as_json_carries_every_number_with_rule_and_source():
    report = as_dict(model_report(presets.get("deepseek-v3")))
    again = json.loads(json.dumps(report))
    assert again["model"]["hidden_size"] == 7168
    totals_by_label = {line["label"]: line["value"] for line in again["totals"]}
    assert totals_by_label["total"] == 671_026_419_200
    assert totals_by_label["stored"] == 684_489_845_504
    assert totals_by_label["FP8 files"] == 688_574_839_360
    assert [round(line["value"] / 671_026_419_200) for line in again["memory"]] == [16, 13, 11]
    assert [sum(t["bytes"] for t in recipe["terms"]) for recipe in again["memory_terms"]] == [16, 13, 11]
    assert round(again["flops"][0]["value"] / 1e9, 2) == 250.46
    assert again["kv_cache"][0]["value"] == 70_272
    for section in ("totals", "memory", "flops", "kv_cache"):
        assert all(line["rule"] and line["source"] and line["unit"] for line in again[section])


def test_context_defaults_to_4096_or_to_what_the_model_takes():
    assert model_report(presets.get("deepseek-v3")).seq_len == 4096
    assert model_report(presets.get("nano")).seq_len == 256
    assert model_report(presets.get("nano"), seq_len=7).seq_len == 7
    with pytest.raises(ConfigError, match="= 0"):
        model_report(presets.get("nano"), seq_len=0)


@pytest.mark.parametrize("name", presets.names())
def test_tables_fit_eighty_columns_and_cut_nothing(name):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    for table in tables(model_report(presets.get(name))):
        console.print(table)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert f"{totals.total(presets.get(name)):,}" in text
