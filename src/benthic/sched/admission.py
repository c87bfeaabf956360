"""Which requests can never be served, said before they wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.errors import AdmissionError

if TYPE_CHECKING:
    from benthic.sched.plans import BatchingConfig
    from benthic.sched.request import Request


def refuse_impossible(request: Request, config: BatchingConfig) -> None:
    """Raise if `request` could not finish even with the whole instance to itself.

    A sequence stores `prompt_len + max_tokens - 1` positions (its last token is never fed back), capped by
    `max_model_len`.

    Raises:
        AdmissionError: the prompt exceeds `max_model_len`, the blocks it may need exceed the cache, or it is
            counted
            where token ids are needed (or the other way round).
    """
    name = f"request {request.request_id!r}"
    if config.counted != (request.prompt is None):
        has, give = (
            ("has no token ids", "prompt") if request.prompt is None else ("carries token ids", "prompt_len")
        )
        msg = f"{name} {has}, but this scheduler was made with counted={config.counted}. Give {give}."
        raise AdmissionError(msg)
    if len(request.block_keys) * config.block_size > request.prompt_len:
        msg = (
            f"{name}: {len(request.block_keys)} block keys of {config.block_size} tokens name more than "
            f"the prompt's {request.prompt_len} tokens. Give one key per full block."
        )
        raise AdmissionError(msg)
    need = request.prompt_len + min(request.max_tokens, 1)
    if need > config.max_model_len:
        msg = (
            f"{name}: a prompt of {request.prompt_len} tokens and {need - request.prompt_len} to generate "
            f"make {need}, but max_model_len = {config.max_model_len}. Shorten the prompt or raise it."
        )
        raise AdmissionError(msg)
    stored = max(total_limit(request, config) - 1, request.prompt_len)
    blocks = -(-stored // config.block_size)
    if blocks > config.num_blocks:
        msg = (
            f"{name}: a prompt of {request.prompt_len} tokens with max_tokens = {request.max_tokens} may "
            f"need {blocks} blocks of {config.block_size}, but num_blocks = {config.num_blocks}. "
            "Lower max_tokens or give the cache more memory."
        )
        raise AdmissionError(msg)


def total_limit(request: Request, config: BatchingConfig) -> int:
    """Most tokens the sequence may reach, prompt and output together."""
    return min(request.prompt_len + request.max_tokens, config.max_model_len)
