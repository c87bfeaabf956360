"""A decode instance hears what is ready of a prompt while the prefill instance computes the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from benthic.serve.messages import MoreReady, PullEarly

if TYPE_CHECKING:
    from benthic.serve.client import EngineClient
    from benthic.serve.messages import Generate, Remote


class Ahead:
    """One prompt, from the first word about it to `stop`.

    Args:
        client: of the decode instance.
        part: the request whose prompt it is.
    """

    def __init__(self, client: EngineClient, part: Generate) -> None:
        self._client = client
        self._part = part
        self._name: str | None = None

    def tell(self, remote: Remote) -> None:
        """So much is ready, and lent under one name."""
        if self._name is not None:
            self._client.post(MoreReady(request_id=self._name, num_tokens=remote.num_tokens))
            return
        self._name = remote.lease_id
        request = msgspec.structs.replace(self._part, request_id=self._name, pull=remote)
        self._client.post(PullEarly(request=request))

    def stop(self) -> None:
        """The prompt has ended, one way or another; what the instance has of it is in its cache."""
        if self._name is not None:
            self._client.release(self._name)
