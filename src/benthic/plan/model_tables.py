"""The report on a model as tables for a terminal of 80 columns or more."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from benthic import units
from benthic.spec.kv import equivalent_groups
from benthic.spec.memory import RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from benthic.plan.model import ModelReport
    from benthic.spec.memory import Recipe
    from benthic.spec.model import ModelConfig

_LETTERS: Final = "L layers, H heads, n r v nope, rope and value dims, C latent, s context"


def tables(report: ModelReport) -> Iterator[RenderableType]:
    """The sections of the report, in the order of reading."""
    yield _heading(report)
    yield _hyper_parameters(report.config)
    yield _parts(report)
    yield _totals(report)
    yield _memory(report)
    yield _flops(report)
    yield _kv(report)


def _table(title: str, left: str, *right: str, rule: str = "rule") -> Table:
    """A table whose first column reads left, the others right, and the last, if any, is a dim rule."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=f"\n{title}", title_justify="left")
    table.title_style = "bold"
    table.add_column(left, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    if rule:
        table.add_column(rule, style="dim")
    return table


def _heading(report: ModelReport) -> Text:
    by_label = {line.label: line.figure.value for line in report.totals}
    total, active = units.count(by_label["total"]), units.count(by_label["activated"])
    return Text.assemble((report.config.name, "bold"), f": {total} parameters, {active} activated a token")


def _hyper_parameters(config: ModelConfig) -> Table:
    cells = list(_settings(config))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    half = (len(cells) + 1) // 2
    for left, right in zip_longest(cells[:half], cells[half:], fillvalue=("", "")):
        table.add_row(*left, *right)
    return table


def _settings(config: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "layers, dense", f"{config.num_hidden_layers}, {config.first_k_dense_replace}"
    yield "hidden size d", str(config.hidden_size)
    yield "vocabulary V", str(config.vocab_size)
    yield "heads H", str(config.num_attention_heads)
    yield "latents Q, C", f"{config.q_lora_rank or 'none'}, {config.kv_lora_rank}"
    dims = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    yield "head dims n, r, v", ", ".join(map(str, dims))
    yield "context", str(config.max_position_embeddings)
    yield "rope", _rope(config)
    yield "experts E, shared", f"{config.n_routed_experts}, {config.n_shared_experts}"
    yield "top-k", str(config.num_experts_per_tok)
    yield "groups, kept", f"{config.n_group}, {config.topk_group}"
    yield "expert width f", str(config.moe_intermediate_size)
    yield "dense width", str(config.intermediate_size)
    yield "scores", f"{config.scoring_func} x {config.routed_scaling_factor:g}"
    yield "choice", config.topk_method
    yield "MTP layers", str(config.num_nextn_predict_layers)


def _rope(config: ModelConfig) -> str:
    base = f"{config.rope_theta:g}"
    return f"{base}, YaRN {config.rope_scaling.factor:g}x" if config.rope_scaling else base


def _parts(report: ModelReport) -> Table:
    table = _table("Parameters", "part", "total", "activated")
    for part in report.parts:
        table.add_row(part.part, f"{part.total:,}", f"{part.active:,}", part.rule)
    return table


def _totals(report: ModelReport) -> Table:
    table = _table("Totals, each by its counting rule", "what", "parameters or bytes")
    for line in report.totals:
        unit = " B" if line.figure.unit == "B" else "  "
        table.add_row(line.label, f"{line.figure.value:,.0f}{unit}", line.figure.rule)
    return table


def _memory(report: ModelReport) -> Table:
    """One row per term, one column per recipe."""
    table = _table(
        "Training state, bytes a parameter (*: ZeRO-1 divides by D)",
        "term",
        *(recipe.name for recipe in RECIPES),
        rule="",
    )
    for terms in zip(*(recipe.terms for recipe in RECIPES), strict=True):
        mark = "*" if terms[0].sharded else ""
        table.add_row(f"{terms[0].name}{mark}", *(f"{term.bytes} {term.dtype:>4}" for term in terms))
    table.add_section()
    table.add_row("sum", *(f"{recipe.bytes} N" for recipe in RECIPES), style="bold")
    table.add_row("all of N", *(units.size(line.figure.value) for line in report.memory), style="bold")
    table.add_row("on one rank", *map(_zero_1, RECIPES))
    return table


def _zero_1(recipe: Recipe) -> str:
    whole = sum(term.bytes for term in recipe.terms if not term.sharded)
    return f"{whole} + {recipe.bytes - whole}/D"


def _flops(report: ModelReport) -> Table:
    table = _table(f"FLOPs a token, s = {report.seq_len}", "what", "value")
    for line in report.flops:
        table.add_row(line.label, units.flops(line.figure.value, 5), line.figure.rule)
    table.caption, table.caption_justify = _LETTERS, "left"
    return table


def _kv(report: ModelReport) -> Table:
    groups = equivalent_groups(report.config)
    title = f"KV cache a token, BF16 (MLA caches as much as {groups:g} groups of GQA)"
    table = _table(title, "model", "attention", "bytes", "x MLA")
    table.columns[1].justify = "left"
    for row in report.kv:
        ratio = row.figure.value / report.kv[0].figure.value
        style = "bold" if row is report.kv[0] else ""
        table.add_row(
            row.model, row.attention, f"{row.figure.value:,.0f}", f"{ratio:.2f}", row.figure.rule, style=style
        )
    return table
