"""Published numbers of serving, each worked out by the planner's own functions, with formula and source."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from benthic.plan.cost import machine as machines
from benthic.plan.example import Example
from benthic.plan.serving import engines
from benthic.plan.serving.acceptance import expected_tokens
from benthic.plan.serving.layout import ServingLayout
from benthic.plan.serving.priced import Engine, PricedStep
from benthic.plan.serving.queueing import Phases, mean_ttft, mean_ttft_inter, mean_ttft_intra
from benthic.plan.serving.steps import StepLoad
from benthic.spec import kv, presets

if TYPE_CHECKING:
    from collections.abc import Iterator


class Worked(NamedTuple):
    """One number: what it is, how it is counted, what comes out, and what was published, if anything was.

    `note` says where sources disagree or what the number leaves out.
    """

    title: str
    formula: str
    value: float
    unit: str
    published: float | None
    source: str
    note: str = ""

    @property
    def error(self) -> float | None:
        """Relative to what was published."""
        return None if self.published is None else self.value / self.published - 1.0


def serving_examples() -> tuple[Worked, ...]:
    """Every example, in the order of reading."""
    return (*_kv(), *_disaggregation(), *_queues(), *_speculation(), *_deployment())


def examples() -> Iterator[Example]:
    """The same as lines of `benthic plan examples`."""
    for each in serving_examples():
        error = "" if each.error is None else f" ({each.error:+.1%})"
        yield Example(
            topic=each.title,
            formula=each.formula,
            value=f"{each.value:.6g} {each.unit}".rstrip() + error,
            printed="" if each.published is None else f"{each.published:g}",
            source=each.source,
            note=each.note,
        )


def _kv() -> Iterator[Worked]:
    v3 = presets.get("deepseek-v3")
    insights = "Insights into DeepSeek-V3 (ISCA 2025), table 1"
    yield _figure("KV cache of DeepSeek-V3", kv.mla(v3), 70272, insights)
    yield _figure("with the MTP layer", kv.mla(v3, mtp=True), 71424, "FlashMLA: 62 layers")
    for name, published, note in (
        ("Qwen2.5-72B", 327680, ""),
        ("Llama-3.1-405B", 516096, "the table prints 7.28 x DeepSeek-V3; the ratio of its own bytes is 7.34"),
    ):
        other = next(each for each in kv.OTHERS if each.name == name)
        figure = kv.grouped(other.layers, other.kv_heads, other.head_dim)
        yield _figure(f"KV cache of {name}", figure, published, insights, note)
    yield Worked(
        "GQA groups that cache as much as MLA", "(C + r) / (2 d_h)", kv.equivalent_groups(v3), "groups",
        2.25, "DeepSeek-V2 report, table 1",
    )  # fmt: skip


def _disaggregation() -> Iterator[Worked]:
    source = "DistServe's blog: 13B, A100, 512 in, 64 out"
    together = min(3.0, 1.6)
    apart = Phases(5.6, 10.0)
    yield Worked("prefill and decode together", "min(3, 1.6)", together, "requests/s/GPU", 1.6, source)
    yield Worked(
        "2 prefill, 1 decode", "min(2 x 5.6, 10) / 3", apart.per_gpu(2, 1), "requests/s/GPU", 3.33, source
    )
    gain = apart.per_gpu(2, 1) / together
    yield Worked(
        "what that gains", "3.33 / 1.6", gain, "x", 2.08, source, "some copies of the lecture say 2.1"
    )
    yield Worked("prefill instances a decode instance", "10 / 5.6", apart.ratio, "", None, source)
    yield Worked(
        "bound if GPUs could be cut", "1 / (1/5.6 + 1/10)", apart.bound, "requests/s/GPU", None, source
    )


def _queues() -> Iterator[Worked]:
    source = "DistServe section 3.1, equations 1 to 3, D = 0.1 s"
    for rate, one, inter, intra in ((5.0, 0.15, 0.10833, 0.07108), (8.0, 0.3, 0.11667, 0.08497)):
        at = f"at {rate:g} requests/s"
        yield Worked(f"mean TTFT {at}", "D + R D^2 / 2(1 - R D)", mean_ttft(0.1, rate), "s", one, source)
        value = mean_ttft_inter(0.1, rate)
        yield Worked(f"layers on two GPUs {at}", "D + R D^2 / 4(2 - R D)", value, "s", inter, source)
        value = mean_ttft_intra(0.1, rate, 1.7)
        formula = "D/K + R D^2 / 2K(K - R D), K = 1.7"
        yield Worked(f"heads on two GPUs {at}", formula, value, "s", intra, source)


def _speculation() -> Iterator[Worked]:
    source = "DeepSeek-V3 report section 5.4.3: 85 to 90 % of second tokens, 1.8 x tokens/s"
    for alpha in (0.8, 0.85, 0.9):
        value = expected_tokens(alpha, 1)
        published = 1.8 if alpha == 0.85 else None
        note = "less 3 to 5 % for the draft and its rows" if published else ""
        formula = "(1 - a^2) / (1 - a)"
        yield Worked(
            f"tokens a step, one draft kept at {alpha:g}", formula, value, "x", published, source, note
        )


@cache
def _deployed() -> tuple[float, float]:
    """Output tokens of a decode GPU and computed prompt tokens of a prefill GPU a second, as deployed.

    Steps take over the prices of their operations what those of our engine do; nobody published DeepSeek's.
    """
    model, machine = presets.get("deepseek-v3"), machines.get("h800")
    own = engines.get("benthic")
    engine = Engine(name="DeepSeek's", stretch=own.stretch, prompt_stretch=own.prompt_stretch)
    wide = ServingLayout(dp_degree=144, weights="fp8", overlap=True, skew=1.1, redundant_experts=32)
    batch = 88
    step = PricedStep(model, wide, machine, engine)([StepLoad(batch, batch, batch * 4989, 0, 0, 0, batch)])
    prompts = ServingLayout(dp_degree=32, weights="fp8", overlap=True, skew=1.1, redundant_experts=32)
    count, length = 4, 4096
    pairs, tokens = count * length * (length + 1) // 2, count * length
    load = StepLoad(0, 0, 0, tokens, pairs, tokens, count)
    return batch / step, tokens / PricedStep(model, prompts, machine, engine)([load])


def _deployment() -> Iterator[Worked]:
    decoded, prefilled = _deployed()
    day = "DeepSeek's inference system overview, H800, means of a day"
    yield Worked(
        "DeepSeek-V3 decode, EP144, 88 sequences of 4,989 a GPU", "88 / step", decoded, "tokens/s/GPU",
        1850, day,
        "14.8 k a node; 1,850 tokens/s at 21 tokens/s a user are 88 users",
    )  # fmt: skip
    yield Worked(
        "DeepSeek-V3 prefill, EP32, 4 x 4,096 a GPU, saturated", "16384 / step", prefilled, "tokens/s/GPU",
        7839, "InferSim's measurement on H800, nothing cached",
    )  # fmt: skip
    yield Worked(
        "load of DeepSeek's prefill GPUs", "9,200 x (1 - 0.563) / saturated",
        9200 * (1 - 0.563) / prefilled, "", None, day,
        "9.2 k a GPU, 56.3 % of it cached, is a day's mean and no bound",
    )  # fmt: skip


def _figure(title: str, figure: kv.Figure, published: float, source: str, note: str = "") -> Worked:
    return Worked(title, figure.rule, figure.value, figure.unit, published, source, note)
