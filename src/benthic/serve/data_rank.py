"""An engine among others that hold the rest of its experts: requests of its own, steps together with them.

DeepSeek-V3 report section 3.4 (data-parallel attention): each rank holds all of attention, and the cache of
its own sequences; routed experts are divided, and tokens travel. So every layer of experts is a meeting of
all ranks (`benthic.parallel.gathered`), and no rank may run a step that the others do not. They take turns:
at each one every rank says what it would run, and a rank without rows runs padding. When no rank has work, no
turn is taken until one has some, and its word wakes the others.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benthic.errors import PeerLostError
from benthic.parallel.gathered import GatheredExperts
from benthic.parallel.start import broke
from benthic.parallel.team import Team, file_store
from benthic.sched.lockstep import Intent
from benthic.serve.build import Rank, assemble, with_grammars
from benthic.serve.engine import Engine
from benthic.serve.peers import Peers
from benthic.serve.ranks import COLLECTIVE_S, own_options, shard_of
from benthic.serve.turns import Together
from benthic.serve.weights import eos_token_ids, load_weights, prepare
from benthic.spec import hf

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.plans import StepPlan
    from benthic.serve.build import Parts
    from benthic.serve.engine import Clock
    from benthic.serve.launched import Launched
    from benthic.serve.messages import Delta
    from benthic.serve.options import EngineOptions

logger = logging.getLogger("benthic.serve.engine")

STORE: Final = "store"
"""The file where the collectives of all ranks find each other."""


class DataRank(Engine):
    """One of several engines that share the routed experts of a model.

    Args:
        parts: as for `Engine`, of this rank's shard.
        options: settings, the same on all ranks.
        turns: how this rank agrees with the others.
        team: how tensors travel between them.
        clock: as for `Engine`.
    """

    def __init__(
        self,
        parts: Parts,
        options: EngineOptions,
        turns: Together,
        team: Team,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(parts, options, clock=clock)
        self._turns = turns
        self._team = team
        self._awake = False
        self._broken = False

    @classmethod
    def join(
        cls,
        path: Path | str,
        options: EngineOptions,
        folder: Path,
        rank: int,
        *,
        clock: Clock = time.monotonic,
    ) -> DataRank:
        """Load rank `rank` of the model in `path` and meet the others in `folder`, which is theirs alone.

        Raises:
            ConfigError: the model or the machine's GPUs do not divide so.
            CheckpointError: the model cannot be read.
            PeerLostError: another rank could not start.
        """
        path = Path(path)
        shard_of(options, rank).check(hf.read(path).config)
        own = own_options(options, rank)
        device, _ = prepare(own)
        peers = Peers.meet(folder, rank, options.data_parallel_size)
        try:
            store = file_store(folder / STORE, peers.size)
            team = Team.join(store, rank, peers.size, device, timeout_s=COLLECTIVE_S)
            return cls.meet(path, own, team, peers, clock=clock)
        except Exception as error:
            lost = peers.lost(error)  # tells the others
            if broke(error):
                raise lost from error
            raise

    @classmethod
    def meet(
        cls, path: Path, options: EngineOptions, team: Team, peers: Peers, *, clock: Clock = time.monotonic
    ) -> DataRank:
        """Load a rank whose team and peers are there already; `options` are its own."""
        shard = shard_of(options, team.index)
        device, dtype = prepare(options)
        model, scales = load_weights(path, options, device, dtype, shard)
        peers.exchange(Intent())  # all have loaded: from now on they wait for each other in collectives
        turns = Together(peers, GatheredExperts.of(model.config, shard, team.group))
        turns.warm_up(model.embed.weight, model.config.num_experts_per_tok)
        parts = assemble(
            model,
            options,
            model_name=path.name,
            eos=eos_token_ids(path, model.config),
            scales=scales,
            rank=Rank(shard, team, turns=turns),
        )
        held = shard.experts(model.config)
        logger.info("rank %d of %d: own requests, experts %d to %d", team.index, team.size, held[0], held[-1])
        return cls(with_grammars(parts, path), options, turns, team, clock=clock)

    @property
    def has_work(self) -> bool:
        """Whether a turn is due: requests here, or a rank that has some."""
        return self._busy or self._awake

    @property
    def _busy(self) -> bool:
        return super().has_work or bool(self._launched)

    @property
    def wake_fd(self) -> int:
        """Readable when another rank waits for this one to take a turn."""
        return self._turns.peers.wake_fd

    def wake(self) -> None:
        """Take a turn at the next step."""
        self._awake = True

    def step(self) -> list[Delta]:
        """As `Engine.step`, in one turn with the other ranks; without rows of its own it runs padding.

        Raises:
            PeerLostError: naming the rank that ended and what it said.
        """
        taken = self._turns.taken
        try:
            deltas = super().step() if self._busy else []
            if self._turns.taken == taken:
                self._awake = self._stand_in(Intent(working=self._busy))
        except PeerLostError:
            self._broken = True
            raise
        except Exception as error:
            self._broken = True
            raise self._turns.peers.lost(error) from error
        return deltas

    def _stand_in(self, intent: Intent) -> bool:
        """Take a turn without rows; whether another one follows."""
        turn = self._turns.take(intent)
        if turn.rows:
            self._runner.stand_in(turn)
        return turn.working

    def _launch(self, plan: StepPlan) -> Launched:
        """As `Engine._launch`; what fails after the turn was taken leaves the others in a collective."""
        taken = self._turns.taken
        launched = super()._launch(plan)
        lost = isinstance(launched.error, PeerLostError)
        if launched.error is not None and (lost or self._turns.taken > taken):
            raise launched.error
        self._awake = True
        return launched

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words` from a thread when another rank has ended and this one waits for it."""
        self._turns.peers.watch(last_words)

    def leave(self) -> None:
        """Run padding for the others until all leave, then let them go; the engine can do nothing more."""
        orderly = not self._broken and self._see_off()
        self._runner.release()
        self._team.part(orderly=orderly)
        self._turns.peers.part()

    def _see_off(self) -> bool:
        """Take turns as long as others need them; False when one of them was lost."""
        try:
            while not (turn := self._turns.take(Intent(leaving=True))).over:
                if turn.rows:
                    self._runner.stand_in(turn)
                if not turn.working:
                    self._turns.peers.wait()
        except PeerLostError as error:
            logger.warning("%s", error)
            return False
        return True
