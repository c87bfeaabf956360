"""`kv_transfer_params`: the hand-over between two servers in the words that vLLM's routers use.

A router sends a request with `max_tokens=1` and `do_remote_decode` to a prefill server, takes
`kv_transfer_params` out of the answer and puts them into the same request for a decode server.
"""

from __future__ import annotations

from typing import Any

import msgspec

from benthic.serve import api_errors
from benthic.serve.messages import Remote


class Handover(msgspec.Struct, frozen=True):
    """What the decode side gets back; unknown names are other servers' and ignored."""

    remote_engine_id: str
    remote_request_id: str
    remote_block_ids: tuple[int, ...]
    remote_host: str
    remote_port: int
    remote_num_tokens: int = 0


def read(
    params: dict[str, Any] | None, *, offered: bool, sequences: int, prompt_tokens: int
) -> tuple[bool, Remote | None]:
    """Whether to keep the blocks for another server, and where another server keeps them.

    Raises:
        ApiError: 400 when this server takes no part in transfers, several sequences are asked for, a name is
            missing or of another type, or the other server computed another prompt.
    """
    if not params or not (params.get("do_remote_decode") or params.get("do_remote_prefill")):
        return False, None
    if not offered:
        msg = "kv_transfer_params is set, but this server was started without --kv-port. Leave it out."
        raise api_errors.invalid(msg, param="kv_transfer_params")
    if sequences != 1:
        msg = f"kv_transfer_params hands over 1 sequence, but {sequences} are asked for. Send them singly."
        raise api_errors.invalid(msg, param="kv_transfer_params")
    if params.get("do_remote_decode"):
        return True, None
    try:
        found = msgspec.convert(params, Handover)
    except msgspec.ValidationError as error:
        msg = f"kv_transfer_params cannot be read: {error}. Pass on what the prefill server answered."
        raise api_errors.invalid(msg, param="kv_transfer_params") from error
    if 0 < found.remote_num_tokens < prompt_tokens:
        msg = (
            f"kv_transfer_params: the prefill server computed {found.remote_num_tokens} tokens, but this "
            f"prompt has {prompt_tokens}. Send both servers the same request."
        )
        raise api_errors.invalid(msg, param="kv_transfer_params")
    remote = Remote(
        instance_id=found.remote_engine_id,
        address=f"tcp://{found.remote_host}:{found.remote_port}",
        lease_id=found.remote_request_id,
        blocks=found.remote_block_ids,
        num_tokens=found.remote_num_tokens,
    )
    return False, remote


def write(remote: Remote | None) -> dict[str, Any] | None:
    """What the prefill side answers; None when the request ended there or was not to be handed over."""
    if remote is None:
        return None
    host, _, port = remote.address.removeprefix("tcp://").rpartition(":")
    found = Handover(
        remote_engine_id=remote.instance_id,
        remote_request_id=remote.lease_id,
        remote_block_ids=remote.blocks,
        remote_host=host,
        remote_port=int(port),
        remote_num_tokens=remote.num_tokens,
    )
    return {"do_remote_prefill": True, "do_remote_decode": False, "tp_size": 1} | msgspec.to_builtins(found)
