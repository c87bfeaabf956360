"""`benthic evaluate`: a checkpoint on held-out documents."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import Annotated, Literal

import typer
from rich.console import Console

from benthic.errors import DataError


def evaluate(  # noqa: PLR0913 (one argument an option)
    model: Annotated[Path, typer.Argument(help="Checkpoint folder in Hugging Face format, e.g. RUN/hf.")],
    *,
    data: Annotated[Path, typer.Option(help="Dataset folder from `benthic data build`.")],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a row (default: what the model allows).")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows computed at once.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Whole documents until so many tokens; 0: all.", min=0)] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")] = "cpu",
    split: Annotated[str, typer.Option(help="held_out or train.")] = "held_out",
    mask_documents: Annotated[bool, typer.Option(help="Keep attention inside documents.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score held-out documents: loss, bits per byte, MTP acceptance."""
    from benthic.model.checkpoint import load_pretrained  # noqa: PLC0415 (torch takes seconds)
    from benthic.model.local import plain_linear  # noqa: PLC0415
    from benthic.train import evaluate as evaluations  # noqa: PLC0415
    from benthic.train.data import shards  # noqa: PLC0415
    from benthic.train.hardware import detect  # noqa: PLC0415

    if device == "cuda":
        detect(device)
    meta = shards.read_meta(data)
    if split not in meta.splits:
        message = f"{data} has no split {split!r}; it has {', '.join(meta.splits)}."
        raise DataError(message)
    loaded = load_pretrained(model, device=device)
    context = loaded.config.max_position_embeddings
    if meta.vocab_size > loaded.config.vocab_size:
        message = (
            f"{data} was tokenized with {meta.vocab_size} tokens, but {model} has vocab_size="
            f"{loaded.config.vocab_size}. Build the data with the model's tokenizer."
        )
        raise DataError(message)
    if seq_len is not None and not 1 <= seq_len <= context:
        message = f"--seq-len {seq_len} is not between 1 and the model's {context} positions."
        raise DataError(message)
    found = evaluations.evaluate(
        evaluations.ModelScore(loaded, plain_linear),
        shards.TokenShards(data, meta, "train" if split == "train" else "held_out"),
        seq_len=seq_len or min(context, 4096),
        rows=rows,
        max_tokens=max_tokens,
        mask_documents=mask_documents,
        mtp_depth=loaded.config.num_nextn_predict_layers,
    )
    if as_json:
        Console().print_json(json.dumps(asdict(found)))
        return
    accepted = "none (no MTP modules)" if found.mtp_acceptance is None else f"{found.mtp_acceptance:.4f}"
    Console().print(
        f"loss            {found.loss:.5f} nats/token\n"
        f"bits_per_byte   {found.bits_per_byte:.5f}\n"
        f"mtp_acceptance  {accepted}\n"
        f"documents       {found.documents} ({found.tokens:,} tokens, {found.bytes:,} bytes)",
        highlight=False,
    )
