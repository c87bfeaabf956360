"""Taking turns: ranks with requests of their own find out before each step what all of them run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benthic.sched.lockstep import conclude

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.parallel.gathered import GatheredExperts
    from benthic.sched.lockstep import Intent, Turn
    from benthic.serve.peers import Peers


class Together:
    """A `benthic.serve.runner.Turns` among ranks of this host.

    Args:
        peers: the other ranks.
        experts: the socket of steps in which all ranks have as many rows.
    """

    def __init__(self, peers: Peers, experts: GatheredExperts) -> None:
        self.taken = 0
        self.peers = peers
        self._experts = experts
        self.exchange = experts
        self.halves: tuple[GatheredExperts, ...] = ()

    def warm_up(self, like_TD: Tensor, top_k: int) -> None:
        """Open the ways of steps with different numbers of rows, which NCCL does at their first use.

        Every rank must call it, before memory is counted.
        """
        exchange = replace(self._experts, rows=(1,) * self.peers.size)
        choice_TK = torch.arange(top_k, device=like_TD.device).unsqueeze(0)
        row_TD = like_TD.new_zeros((1, like_TD.shape[1]))
        arrived = exchange.finish_dispatch(exchange.start_dispatch(row_TD, choice_TK, choice_TK.float()))
        exchange.finish_combine(exchange.start_combine(torch.zeros_like(arrived.rows_RD), arrived))

    def take(self, intent: Intent) -> Turn:
        """Take one turn; every rank must.

        Raises:
            PeerLostError: another rank has ended.
        """
        turn = conclude(self.peers.exchange(intent))
        self.taken += 1
        self.exchange = replace(self._experts, rows=() if turn.size else turn.rows)
        self.halves = tuple([replace(self._experts, rows=rows) for rows in turn.halves])
        return turn
