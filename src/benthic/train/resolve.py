"""From what was asked and what the machine is to a config without `auto`: pure, complete, with reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from benthic.errors import ConfigError
from benthic.parallel.exchange_choice import GPUS_OF_A_HOST, assumed_spots, choose_exchange, facts_among
from benthic.parallel.setup import expanded, number, unrecordable
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.parallel.exchange_choice import Spot
    from benthic.spec.model import ModelConfig
    from benthic.train.config import LoopConfig, NumberType, RunConfig
    from benthic.train.data.shards import Meta
    from benthic.train.hardware import HardwareFacts

_AUTO_SEQ_LEN: Final = 4096
_WHY_WEIGHTS: Final = {
    "bfloat16": "tensor cores want bfloat16; masters and gradients stay float32",
    "float32": "a CPU gains nothing from narrower running weights",
}
_WHY_FP8: Final = "products in FP8 read an FP8 copy of the float32 master; no other copy is kept"
_TILE: Final = 128
_WHY_ASYNC: Final = {
    True: "the GPU trains on while a thread writes a copy",
    False: "a thread would take the cores that train",
}
_WHY_THREADS: Final = {
    "cpu": "torch's choice on this machine",
    "cuda": "the GPU computes; threads would only wait for each other",
}
_WHY_FP8_EXCHANGE: Final = {
    True: "the experts' products round their input to FP8 anyway; half the bytes travel",
    False: "only experts elsewhere that multiply in FP8 want tokens in FP8",
}
_AUTO_TOKENS: Final = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Choice:
    """One field that was `auto` or was taken from the data, what it became, and why."""

    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Resolved:
    """A config in which nothing is `auto`, and how it came to be."""

    config: RunConfig
    choices: tuple[Choice, ...]


def resolve(
    config: RunConfig,
    facts: HardwareFacts,
    data: Meta,
    *,
    ranks: int = 1,
    spots: Sequence[Spot] | None = None,
) -> Resolved:
    """Replace every `auto`, take the token ids from the data, and check everything against everything.

    `ranks` processes were started; what the layout leaves open of them becomes data parallelism. `spots` say
    where they run; None assumes hosts of eight GPUs.

    Raises:
        ConfigError: every contradiction at once, one line each, with its numbers and a remedy.
        BackendError: the exchange that was asked for cannot run between these ranks.
    """
    choices: list[Choice] = []
    config = _layout(config, ranks, choices.append)
    for settle in (_device, _precision, _checkpoint, _data, _model, _loop):
        config = settle(config, facts, data, choices.append)
    problems = [*_problems(config, facts, data), *_layout_problems(config, ranks)]
    if problems:
        heading = f"{len(problems)} settings cannot be used:" if len(problems) > 1 else ""
        raise ConfigError("\n".join([*([heading] if heading else []), *problems]))
    config = _exchange(config, spots, choices.append)
    config = _cuda_graph(config, choices.append)
    return Resolved(config, tuple(choices))


def _cuda_graph(config: RunConfig, note: Callable[[Choice], None]) -> RunConfig:
    """Whether steps are recorded; the exchange is known.

    Raises:
        ConfigError: they are to be, but cannot.
    """
    asked, refusal = config.train.cuda_graph, f"device={config.device} has no CUDA graphs"
    if config.device == "cuda":
        refusal = unrecordable(config, counted=config.exchange.kind == "all_to_all")
    if asked is True and refusal:
        msg = f"train.cuda_graph=true, but {refusal}. Set it to auto or false."
        raise ConfigError(msg)
    if asked != "auto":
        return config
    note(Choice("train.cuda_graph", not refusal, refusal or "one launch a step, whatever the host does"))
    return replace(config, train=replace(config.train, cuda_graph=not refusal))


def _layout(config: RunConfig, ranks: int, note: Callable[[Choice], None]) -> RunConfig:
    """Ranks that no degree speaks for see other rows."""
    layout = config.layout
    if layout.dp_degree != 1 or not 1 <= layout.ranks < ranks or ranks % layout.ranks:
        return config
    degree = ranks // layout.ranks
    note(Choice("layout.dp_degree", degree, f"{ranks} ranks / {layout.ranks} of the other degrees"))
    return replace(config, layout=replace(layout, dp_degree=degree))


def _layout_problems(config: RunConfig, ranks: int) -> Iterator[str]:
    layout, loop = config.layout, config.train
    yield from layout.problems(config.model, ranks=ranks, seq_len=number(loop.seq_len))
    step = layout.dp_degree * number(loop.local_batch_size)
    whole = number(loop.global_batch_size)
    if layout.dp_degree > 1 and step > 0 and whole % step:
        yield (
            f"train.global_batch_size={whole} does not divide over layout.dp_degree={layout.dp_degree} x "
            f"train.local_batch_size={loop.local_batch_size} = {step} rows. Set it to a multiple of {step}."
        )
    if config.log.sample_tokens and layout.ranks > 1:
        yield (
            f"log.sample_tokens={config.log.sample_tokens} wants the whole model on one rank, but there are "
            f"{layout.ranks}. Set it to 0; sample from the export with `benthic serve`."
        )


def _exchange(config: RunConfig, spots: Sequence[Spot] | None, note: Callable[[Choice], None]) -> RunConfig:
    """The exchange of every expert group; the layout is known to be possible."""
    asked, layout = config.exchange, config.layout
    places = assumed_spots(layout.ranks) if spots is None else spots
    facts = replace(
        facts_among(places, layout.expert_groups(), config.device),
        combine_again="combine" in config.recompute,
    )
    kind, reason = choose_exchange(facts, asked.kind)
    if spots is None and facts.ranks > 1 and config.device == "cuda":
        reason += f" (if every host has {GPUS_OF_A_HOST} GPUs that reach each other)"
    if asked.kind == "auto":
        note(Choice("exchange.kind", kind, reason))
    fp8 = asked.fp8
    if fp8 == "auto":
        fp8 = kind != "local" and config.precision.matmul == "fp8"
        note(Choice("exchange.fp8", fp8, _WHY_FP8_EXCHANGE[fp8]))
    return replace(config, exchange=replace(asked, kind=kind, fp8=fp8))


def _device(config: RunConfig, facts: HardwareFacts, _: Meta, note: Callable[[Choice], None]) -> RunConfig:
    if config.device != "auto":
        return config
    note(Choice("device", facts.device, f"found {facts.name}"))
    return replace(config, device=facts.device)


def _precision(config: RunConfig, facts: HardwareFacts, _: Meta, note: Callable[[Choice], None]) -> RunConfig:
    precision = config.precision
    if precision.weights == "auto":
        weights: NumberType = "bfloat16" if facts.device == "cuda" else "float32"
        weights = "fp8" if precision.matmul == "fp8" else weights
        reason = _WHY_FP8 if weights == "fp8" else _WHY_WEIGHTS[weights]
        note(Choice("precision.weights", weights, reason))
        precision = replace(precision, weights=weights)
    if precision.matmul == "auto":
        note(Choice("precision.matmul", precision.weights, "the same as precision.weights"))
        precision = replace(precision, matmul=precision.weights)
    if precision.matmul == "fp8":
        note(Choice("precision.matmul", "fp8", _about_tiles(config.model)))
    return replace(config, precision=precision)


def _about_tiles(model: ModelConfig) -> str:
    """What runs in FP8, and which widths leave a tile partly empty."""
    narrow = [p for p in parameters(model) if p.fp8]
    widths = sorted({size for p in narrow for size in p.shape[-2:] if size % _TILE})
    share = sum(p.numel for p in narrow) / sum(p.numel for p in parameters(model))
    reason = f"{100 * share:.1f}% of the parameters multiply in FP8, the others in bfloat16"
    if widths:
        listed = ", ".join(map(str, widths))
        reason += f"; widths {listed} are no multiple of {_TILE}: their last tiles are smaller"
    return reason


def _checkpoint(
    config: RunConfig, facts: HardwareFacts, _: Meta, note: Callable[[Choice], None]
) -> RunConfig:
    if config.checkpoint.async_save != "auto":
        return config
    overlaps = facts.device == "cuda"
    note(Choice("checkpoint.async_save", overlaps, _WHY_ASYNC[overlaps]))
    return replace(config, checkpoint=replace(config.checkpoint, async_save=overlaps))


def _data(config: RunConfig, _: HardwareFacts, data: Meta, note: Callable[[Choice], None]) -> RunConfig:
    if config.data.packing != "auto":
        return config
    if data.masked:
        reason = "some tokens are not to be learned: conversations, which rows should not cut"
        note(Choice("data.packing", "whole", reason))
    packing: Literal["stream", "whole"] = "whole" if data.masked else "stream"
    return replace(config, data=replace(config.data, packing=packing))


def _model(config: RunConfig, _: HardwareFacts, data: Meta, note: Callable[[Choice], None]) -> RunConfig:
    """The ids that begin and end a document are the tokenizer's, whatever the preset says.

    A model that is continued has met its own ids already: then they must agree.
    """
    model = config.model
    if config.init_from:
        return config
    reason = "the tokenizer of the data says so"
    if data.bos_token_id is not None and model.bos_token_id != data.bos_token_id:
        note(Choice("model.bos_token_id", data.bos_token_id, reason))
        model = replace(model, bos_token_id=data.bos_token_id)
    if model.eos_token_id != data.eos_token_id:
        note(Choice("model.eos_token_id", data.eos_token_id, reason))
        model = replace(model, eos_token_id=data.eos_token_id)
    return replace(config, model=model)


def _loop(config: RunConfig, facts: HardwareFacts, _: Meta, note: Callable[[Choice], None]) -> RunConfig:
    loop, context = config.train, config.model.max_position_embeddings
    if loop.seq_len == "auto":
        seq_len = min(context, _AUTO_SEQ_LEN)
        reason = f"the model's {context} positions, at most {_AUTO_SEQ_LEN}"
        note(Choice("train.seq_len", seq_len, reason))
        loop = replace(loop, seq_len=seq_len)
    if loop.local_batch_size == "auto":
        loop = _local_batch(loop, facts, note)
    if loop.global_batch_size == "auto":
        note(Choice("train.global_batch_size", loop.local_batch_size, "one microbatch a step"))
        loop = replace(loop, global_batch_size=loop.local_batch_size)
    if loop.threads == "auto":
        note(Choice("train.threads", facts.threads, _WHY_THREADS[facts.device]))
        loop = replace(loop, threads=facts.threads)
    return replace(config, train=loop)


def _local_batch(loop: LoopConfig, facts: HardwareFacts, note: Callable[[Choice], None]) -> LoopConfig:
    """Enough rows to keep the device busy, but no more than the step has."""
    tokens, seq_len = _AUTO_TOKENS[facts.device], number(loop.seq_len)
    rows = max(1, tokens // max(1, seq_len))
    if loop.global_batch_size != "auto":
        rows = next(r for r in range(min(rows, max(1, loop.global_batch_size)), 0, -1) if _divides(r, loop))
    reason = f"about {tokens} tokens keep a {facts.device} busy, in rows of {seq_len}"
    note(Choice("train.local_batch_size", rows, reason))
    return replace(loop, local_batch_size=rows)


def _divides(rows: int, loop: LoopConfig) -> bool:
    return number(loop.global_batch_size) % rows == 0


def _problems(config: RunConfig, facts: HardwareFacts, data: Meta) -> Iterator[str]:
    yield from _loop_problems(config.train, config.model)
    yield from _guard_problems(config.train)
    yield from _optimizer_problems(config)
    yield from _memory_problems(config)
    yield from _model_problems(config.model, data)
    if config.init_from:
        yield from _continued_problems(config.model, data)
    if config.device != facts.device:
        yield f"device={config.device}, but the machine was looked at as {facts.device!r}. Set device=auto."
    if config.precision.weights == "fp8" and config.precision.matmul != "fp8":
        yield (
            f"precision.weights=fp8 with precision.matmul={config.precision.matmul} would read weights "
            "that were rounded to FP8 for nothing. Set precision.matmul=fp8 or precision.weights=bfloat16."
        )
    if config.precision.weights == "bfloat16" and config.precision.matmul == "float32":
        yield (
            "precision.weights=bfloat16 with precision.matmul=float32 would widen every product. "
            "Set precision.weights=float32 or precision.matmul=bfloat16."
        )
    for name, value in _counts(config).items():
        if value < 0:
            yield f"{name}={value} is below 0. Set it to 0 or more."


def _counts(config: RunConfig) -> dict[str, float]:
    return {
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_latest_k": config.checkpoint.keep_latest_k,
        "evaluate.every": config.evaluate.every,
        "evaluate.max_tokens": config.evaluate.max_tokens,
        "log.every": config.log.every,
        "log.load_every": config.log.load_every,
        "log.sample_tokens": config.log.sample_tokens,
        "log.timeline_every": config.log.timeline_every,
        "loss.balance_alpha": config.loss.balance_alpha,
        "train.final_lr": config.train.final_lr,
        "train.max_norm": config.train.max_norm,
        "train.stuck_s": config.train.stuck_s,
        "train.warmup_steps": config.train.warmup_steps,
    }


def _loop_problems(loop: LoopConfig, model: ModelConfig) -> Iterator[str]:
    seq_len, local, whole = (number(v) for v in (loop.seq_len, loop.local_batch_size, loop.global_batch_size))
    for name in ("steps", "seq_len", "local_batch_size", "global_batch_size", "threads"):
        if number(getattr(loop, name)) < 1:
            yield f"train.{name}={getattr(loop, name)} is below 1. Set it to 1 or more."
    if seq_len > model.max_position_embeddings:
        yield (
            f"train.seq_len={seq_len} exceeds model.max_position_embeddings={model.max_position_embeddings}. "
            "Shorten the rows or give the model more positions."
        )
    if local > 0 and whole % local:
        yield (
            f"train.global_batch_size={whole} is no multiple of train.local_batch_size={local}. "
            f"Set it to {max(1, whole // local) * local} or {(whole // local + 1) * local}."
        )
    if not -(2**63) <= loop.seed < 2**64:
        yield f"train.seed={loop.seed} does not fit into 64 bits. Set it between 0 and {2**64 - 1}."
    if not 0.0 < loop.lr < 1.0:
        yield f"train.lr={loop.lr} is not between 0 and 1. AdamW wants something like 3e-4."
    if loop.final_lr > 1.0:
        yield f"train.final_lr={loop.final_lr} is the last rate over train.lr. Set it to 1 or less."
    if loop.warmup_steps > loop.steps:
        yield f"train.warmup_steps={loop.warmup_steps} exceeds train.steps={loop.steps}. Shorten the warm-up."
    if (loop.schedule == "curve") != (loop.lr_curve is not None):
        given = "is missing" if loop.lr_curve is None else f"={loop.lr_curve} would be ignored"
        yield f"train.schedule={loop.schedule}, but train.lr_curve {given}. Set both or neither."


def _guard_problems(loop: LoopConfig) -> Iterator[str]:
    """What watches over a run: spikes of the loss, ranks that stand still."""
    if loop.spike_factor != 0.0 and loop.spike_factor <= 1.0:
        yield (f"train.spike_factor={loop.spike_factor} would skip ordinary steps. Set it above 1, or to 0.")
    if loop.spike_window < 2:
        yield f"train.spike_window={loop.spike_window} is below 2. Set it to 2 or more."
    if loop.timeout_s <= loop.stuck_s:
        yield (
            f"train.timeout_s={loop.timeout_s} is not above train.stuck_s={loop.stuck_s}, so collectives "
            "would end first and no rank say where it stands. Raise the one or lower the other."
        )


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    for name in ("beta1", "beta2", "momentum"):
        value = getattr(optimizer, name)
        if not 0.0 <= value < 1.0:
            yield f"optimizer.{name}={value} is not in [0, 1)."
    if optimizer.eps <= 0.0 or optimizer.weight_decay < 0.0:
        yield (
            f"optimizer.eps={optimizer.eps} must be above 0 and "
            f"optimizer.weight_decay={optimizer.weight_decay} at least 0."
        )
    if optimizer.store_param_remainders and config.precision.weights == "float32":
        yield (
            "optimizer.store_param_remainders=true keeps what bfloat16 weights lack of their masters, but "
            "precision.weights=float32 are masters themselves. Set it to false or precision.weights=bfloat16."
        )
    if optimizer.name == "muon" and config.layout.tp_degree > 1:
        yield (
            f"optimizer.name=muon needs whole matrices, but layout.tp_degree={config.layout.tp_degree} cuts "
            "them. Set tp_degree=1 and divide tokens with cp_degree or dp_degree, or optimizer.name=adamw."
        )


def _memory_problems(config: RunConfig) -> Iterator[str]:
    both = sorted(expanded(config.recompute) & set(config.offload))
    if both:
        yield (
            f"recompute and offload both name {', '.join(both)}: a phase that is computed again keeps "
            "nothing to move to the host. Leave each in one of the two."
        )


def _model_problems(model: ModelConfig, data: Meta) -> Iterator[str]:
    if data.vocab_size > model.vocab_size:
        yield (
            f"the data's tokenizer has {data.vocab_size} tokens, but model.vocab_size={model.vocab_size}. "
            f"Set model.vocab_size={data.vocab_size} or build the data with a smaller tokenizer."
        )


def _continued_problems(model: ModelConfig, data: Meta) -> Iterator[str]:
    """The ids of the checkpoint against those of the tokenizer that wrote the data."""
    pairs = {"bos_token_id": data.bos_token_id, "eos_token_id": data.eos_token_id}
    for name, found in pairs.items():
        expected = getattr(model, name)
        if found is not None and found != expected:
            yield (
                f"the data's tokenizer has {name}={found}, but the model to continue has {expected}. Build "
                f"the data with the checkpoint's tokenizer, or set model.{name}={found} if its config.json "
                "is wrong."
            )
