"""What one model is and costs: the figures behind `benthic plan model`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from benthic.spec import flops, kv, totals
from benthic.spec.figure import Figure
from benthic.spec.memory import RECIPES
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Part

_SEQ_LEN: Final = 4096
_TABLE: Final = "sum over the parameter table"
_V3_NOTES: Final = "DeepSeek-V3 weight notes"


@dataclass(frozen=True)
class Line:
    """A figure with its name."""

    label: str
    figure: Figure


@dataclass(frozen=True)
class PartLine:
    """One part of the network: its parameters, how many of them a token uses, and the formula."""

    part: Part
    total: int
    active: int
    rule: str


@dataclass(frozen=True)
class ModelReport:
    """Everything that is printed about a model. Sizes are of the main model unless a label says MTP."""

    config: ModelConfig
    seq_len: int
    parts: tuple[PartLine, ...]
    totals: tuple[Line, ...]
    memory: tuple[Line, ...]
    flops: tuple[Line, ...]
    kv: tuple[kv.KVRow, ...]


def model_report(config: ModelConfig, *, seq_len: int | None = None) -> ModelReport:
    """Count everything about `config`.

    Args:
        config: the model.
        seq_len: length of training sequences, prompts and decoding contexts; None is 4096, or the longest
        that the model takes if that is shorter.

    Raises:
        ConfigError: `seq_len` is below one.
    """
    length = min(_SEQ_LEN, config.max_position_embeddings) if seq_len is None else seq_len
    return ModelReport(
        config=config,
        seq_len=length,
        parts=_parts(config),
        totals=tuple(_totals(config)),
        memory=_memory(config),
        flops=tuple(_flops(config, length)),
        kv=kv.table(config),
    )


def as_dict(report: ModelReport) -> dict[str, object]:
    """The report as JSON-ready values, every figure with unit, rule and source."""
    return {
        "model": asdict(report.config),
        "seq_len": report.seq_len,
        "parameters": [asdict(part) for part in report.parts],
        **{
            name: [{"label": line.label, **asdict(line.figure)} for line in lines]
            for name, lines in (("totals", report.totals), ("memory", report.memory), ("flops", report.flops))
        },
        "kv_cache": [{"model": r.model, "attention": r.attention, **asdict(r.figure)} for r in report.kv],
        "memory_terms": [{"name": r.name, "terms": [asdict(t) for t in r.terms]} for r in RECIPES],
    }


def _parts(config: ModelConfig) -> tuple[PartLine, ...]:
    total: Counter[Part] = Counter()
    active: dict[Part, Fraction] = {}
    for p in parameters(config, include_mtp=False):
        total[p.part] += p.numel
        active[p.part] = active.get(p.part, Fraction(0)) + p.numel * p.active
    rules = _part_rules(config)
    present = [part for part in rules if part in total]
    return tuple(PartLine(part, total[part], int(active[part]), rules[part]) for part in present)


def _part_rules(config: ModelConfig) -> dict[Part, str]:
    """The formula of each part. d model, H heads, Q and C latents, n, r, v head dims, f expert width."""
    dense = config.num_hidden_layers if not config.n_routed_experts else config.first_k_dense_replace
    moe = config.num_hidden_layers - dense
    query = "d H(n+r)" if config.q_lora_rank is None else "d Q + Q H(n+r)"
    bias = " + E" if config.topk_method == "noaux_tc" else ""
    return {
        "embedding": "V d",
        "attention": f"{config.num_hidden_layers} ({query} + d(C+r) + C H(n+v) + H v d)",
        "dense MLP": f"{dense} x 3 d {config.intermediate_size}",
        "router": f"{moe} (E d{bias})",
        "routed experts": f"{moe} x {config.n_routed_experts} x 3 d f",
        "shared experts": f"{moe} x 3 d ({config.n_shared_experts} f)",
        "norms": "2 d and latents a layer, d",
        "head": "V d",
    }


def _totals(config: ModelConfig) -> list[Line]:
    def line(label: str, value: int, rule: str, source: str = _TABLE) -> Line:
        return Line(label, Figure(value, "parameters", rule, source))

    head = totals.active(config, "head")
    lines = [
        line("total", totals.total(config), "main model, everything once"),
        line("activated", head, "top-k experts, with head, no embedding", _V3_NOTES),
        line("  body only", totals.active(config, "body"), "neither embedding nor head"),
        line("  with both", totals.active(config, "embedding and head"), "embedding and head"),
    ]
    if config.num_nextn_predict_layers:
        lines += [
            line("MTP, its own", totals.mtp_unique(config), "blocks, projections, norms of MTP layers"),
            line("MTP, stored", totals.mtp_stored(config), "and its copies of embedding and head"),
            line("stored", totals.stored(config), "in a checkpoint: total + MTP, stored"),
        ]
    return lines + _checkpoints(config)


def _checkpoints(config: ModelConfig) -> list[Line]:
    bf16 = totals.checkpoint_bytes(config, fp8=False)
    fp8 = totals.checkpoint_bytes(config, fp8=True)
    return [
        Line("BF16 files", Figure(bf16, "B", "2 B each; router bias 4 B", _TABLE)),
        Line("FP8 files", Figure(fp8, "B", "matrices 1 B + 4 B per 128x128 block", _TABLE)),
    ]


def _memory(config: ModelConfig) -> tuple[Line, ...]:
    count = totals.total(config)
    return tuple(Line(recipe.name, recipe.total(count)) for recipe in RECIPES)


def _flops(config: ModelConfig, length: int) -> list[Line]:
    lines = [
        Line("training, causal", flops.training(config, length)),
        Line("training, all pairs", flops.training(config, length, causal=False)),
    ]
    if config.num_nextn_predict_layers:
        lines.append(Line("training with MTP", flops.training(config, length, mtp=True)))
    return [
        *lines,
        Line("prefill", flops.prefill(config, length)),
        Line("decode, absorbed", flops.decode(config, length)),
        Line("decode, expanded", flops.decode(config, length, "expanded")),
    ]
