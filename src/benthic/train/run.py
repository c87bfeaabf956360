"""A whole run in its folder: resume, steps, records, checkpoints, evaluations, pictures, export."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

import torch

from benthic import units
from benthic.errors import CheckpointError, ConfigError
from benthic.parallel.exchange_choice import spots_of
from benthic.parallel.export import save_stages
from benthic.parallel.mesh import Mesh
from benthic.parallel.peers import Peers
from benthic.parallel.setup import number
from benthic.parallel.start import Launch, anyone
from benthic.parallel.watchdog import Watchdog
from benthic.spec.parameters import parameters
from benthic.train import boards
from benthic.train.checkpoint import FolderStore
from benthic.train.data import tokenizer as tokenizers
from benthic.train.data.shards import TokenShards, read_meta, verify
from benthic.train.evaluate import Evaluation, evaluate
from benthic.train.failures import Failures
from benthic.train.fields import to_json
from benthic.train.initial import open_initial
from benthic.train.measure import Measures
from benthic.train.precision import DTYPES
from benthic.train.records import EVALUATIONS, Records
from benthic.train.resolve import resolve
from benthic.train.rows import planned_tokens
from benthic.train.sample import sample
from benthic.train.speed import Meter, console_line
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.boards import Board
    from benthic.train.config import RunConfig
    from benthic.train.data.shards import Meta
    from benthic.train.hardware import HardwareFacts
    from benthic.train.initial import Initial
    from benthic.train.measure import Measured
    from benthic.train.profile import Steps
    from benthic.train.resolve import Resolved
    from benthic.train.speed import Speed
    from benthic.train.trainer import StepResult

RESOLVED: Final = "resolved.json"
LOGS: Final = "logs"
_SAMPLE_TEMPERATURE: Final = 0.6


class Watcher(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None:
        """One line of information."""
        ...

    def step(self, result: StepResult, speed: Speed) -> None:
        """One step is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Whether to continue what is in the run folder, and from which step (None: the newest)."""

    wanted: bool = False
    step: int | None = None


@dataclass
class Run:
    """One run; `prepare` builds it, `go` runs it to its end or until `should_stop`."""

    folder: Path
    config: RunConfig
    trainer: Trainer
    held_out: TokenShards
    store: FolderStore
    records: Records
    meter: Meter
    watcher: Watcher
    should_stop: Callable[[], bool]
    watchdog: Watchdog
    failures: Failures
    measures: Measures
    boards: tuple[Board, ...] = ()
    clock: Callable[[], float] = perf_counter
    _saved: int = field(default=-1)

    def go(self, *, profile: Steps | None = None) -> bool:
        """Train until the last step; return False if stopped before it, with a checkpoint written.

        `profile` are steps to trace with torch's profiler, into `RUN/profile`.

        Raises:
            NumericsError: a loss or gradient is not finite; the last checkpoint stays.
            CheckpointError: a checkpoint could not be written; the one before stays.
            PeerLostError: another rank ended; what it left is named.
        """
        self.measures.tracer.steps = profile
        try:
            with self.watchdog:
                finished = self._go()
        except Exception as error:
            self._give_up()
            raise self.failures.explain(error, self.trainer.steps_done + 1) from error
        self.store.wait()
        self.trainer.close()
        return finished

    def _give_up(self) -> None:
        """Let a checkpoint that is being written come to its end; what it raises is told, not raised."""
        try:
            self.store.wait()
        except CheckpointError as error:
            self.watcher.note(f"the checkpoint that was being written failed too: {error}")

    def _go(self) -> bool:
        while self.trainer.steps_done < self.config.train.steps:
            self.watchdog.begin(f"step {self.trainer.steps_done + 1}")
            if anyone(self.should_stop(), self.trainer.mesh.world, self.trainer.device):
                self._save(wait=True)
                self.watcher.note(f"stopped after step {self.trainer.steps_done}; pass --resume to go on")
                return False
            self._step()
        self.watchdog.rest()
        self._finish()
        return True

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once: records, pictures, notes."""
        return self.trainer.mesh.rank == 0

    def _step(self) -> None:
        start = self.clock()
        measured = self.measures.step()
        result = measured.result
        self._record(measured, self.meter.add(result, self.clock() - start))
        if due(result.step, self.config.evaluate.every) and result.step < self.config.train.steps:
            self.watchdog.begin(f"evaluation after step {result.step}")
            self._evaluate()
        if due(result.step, self.config.checkpoint.every):
            self.watchdog.begin(f"checkpoint of step {result.step}")
            self._save(wait=not self.config.checkpoint.async_save)

    def _record(self, measured: Measured, speed: Speed) -> None:
        if not self.leads:
            return
        result = measured.result
        self.records.step(result, speed, measured.slowest)
        if measured.spans:
            self.records.spans(measured.spans)
        last = result.step == self.config.train.steps
        if due(result.step, self.config.log.load_every) or last:
            self.records.loads(result)
        self.watcher.step(result, speed)
        if due(result.step, self.config.log.every) or result.step == 1 or last:
            recent = self.meter.since_last()
            self.watcher.note(console_line(result, recent))
        for note in measured.notes:
            self.watcher.note(note)
        for board in self.boards:
            board.step(result, speed)

    def _save(self, *, wait: bool) -> None:
        if self._saved != self.trainer.steps_done:
            self.store.save(self.trainer.saved(), wait=wait)
            self._saved = self.trainer.steps_done
        elif wait:
            self.store.wait()

    def _evaluate(self) -> Evaluation | None:
        """Score the held-out documents; None when the data has none."""
        if self.held_out.tokens == 0:
            return None
        found = evaluate(
            self.trainer.executor.score,
            self.held_out,
            seq_len=number(self.config.train.seq_len),
            rows=number(self.config.train.local_batch_size),
            max_tokens=self.config.evaluate.max_tokens,
            mask_documents=self.config.data.mask_documents,
            mtp_depth=self.config.model.num_nextn_predict_layers,
        )
        if not self.leads:
            return found
        self.records.evaluation(self.trainer.steps_done, found)
        self.watcher.note(evaluation_line(self.trainer.steps_done, found))
        for board in self.boards:
            board.evaluation(self.trainer.steps_done, found)
        return found

    def _finish(self) -> None:
        """What comes after the last step; a finished run that is resumed is not evaluated twice."""
        self._save(wait=True)
        if all(line["step"] != self.trainer.steps_done for line in self.records.read(EVALUATIONS)):
            self._evaluate()
        for board in self.boards:
            board.close()
        if self.config.log.pictures and self.leads:
            from benthic.train.pictures import draw  # noqa: PLC0415 (matplotlib takes a second)

            self.watcher.note(f"pictures: {', '.join(map(str, draw(self.folder)))}")
        if self.config.log.sample_tokens:
            self._sample()
        if self.config.checkpoint.export:
            self._export()

    def _sample(self) -> None:
        log, words = self.config.log, tokenizers.load(self.held_out.folder / "tokenizer")
        ids = sample(
            self.trainer.model,
            words.encode(log.sample_prompt),
            count=log.sample_tokens,
            temperature=_SAMPLE_TEMPERATURE,
            seed=self.config.train.seed,
            eos_token_id=words.eos_token_id,
            linear=self.trainer.executor.linear,
        )
        text = log.sample_prompt + words.decode(ids)
        (self.folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
        self.watcher.note(f"sample:\n{text}")

    def _export(self) -> None:
        """Write the finished model, in place of what the run exported when it last ended, if it did."""
        target, unfinished = self.folder / "hf", self.folder / "hf.unfinished"
        trainer, dtype = self.trainer, DTYPES[self.config.checkpoint.export_dtype]
        if self.leads and unfinished.exists():
            shutil.rmtree(unfinished)
        save_stages(trainer.stages, trainer.mesh, self.config.model, unfinished, dtype=dtype)
        if self.leads:
            tokenizers.copy(self.held_out.folder / "tokenizer", unfinished)
            if target.exists():
                shutil.rmtree(target)
            unfinished.replace(target)
        self.watcher.note(f"exported to {target}: try `benthic serve {target}`")


def prepare(
    folder: Path,
    config: RunConfig,
    data: Path,
    facts: HardwareFacts,
    watcher: Watcher,
    *,
    resume: Resume,
    should_stop: Callable[[], bool],
    launch: Launch | None = None,
) -> Run:
    """Check data, config and folder, build the trainer, and continue where a checkpoint says.

    Every rank of `launch` calls it inside `parallel.start.joined`; None is this process alone. Rank 0 alone
    writes to the folder and talks to `watcher`.

    Raises:
        DataError: the data cannot be used.
        ConfigError: settings contradict each other, or the folder holds a run and `resume` is not wanted.
        CheckpointError: the checkpoint cannot be continued from.
    """
    launch = Launch() if launch is None else launch
    failures = Failures(folder / LOGS, launch.rank, launch.ranks)
    failures.forget()
    meta = read_meta(data)
    spots = spots_of(None, torch.device(facts.device)) if launch.ranks > 1 else None
    resolved = resolve(config, facts, meta, ranks=launch.ranks, spots=spots)
    if resolved.config.data.verify and launch.leads:
        verify(data, meta)
    store = FolderStore(
        folder / "checkpoint", resolved.config.checkpoint.keep_latest_k, peers=Peers.everyone()
    )
    start_at = _step_to_resume(store, resume)
    fresh = resolved.config.init_from and start_at is None
    initial = open_initial(resolved.config, data) if fresh else None
    mesh = Mesh.of(resolved.config.layout, launch.rank)
    trainer = Trainer(resolved.config, TokenShards(data, meta, "train"), mesh)
    _describe(resolved, trainer, meta, watcher)
    if initial is not None:
        _start_from(initial, trainer, watcher)
    start = _restore(trainer, store, start_at, watcher) if resume.wanted else 0
    records = Records(folder)
    if launch.leads:
        folder.mkdir(parents=True, exist_ok=True)
        _write_resolved(folder, resolved, facts)
        records.resume(start)
    meter = Meter(resolved.config, facts)
    watcher.note(meter.describe())
    return Run(
        folder=folder,
        config=resolved.config,
        trainer=trainer,
        held_out=TokenShards(data, meta, "held_out"),
        store=store,
        records=records,
        meter=meter,
        watcher=watcher,
        should_stop=should_stop,
        watchdog=_watchdog(folder, trainer),
        failures=failures,
        measures=Measures.of(trainer, folder),
        boards=boards.of(folder, resolved.config, start) if launch.leads else (),
        _saved=start if start else -1,
    )


def due(step: int, every: int) -> bool:
    """Whether `step` is one of every `every`; 0 is never."""
    return every > 0 and step % every == 0


def evaluation_line(step: int, found: Evaluation) -> str:
    """The result of an evaluation in one line."""
    accepted = "" if found.mtp_acceptance is None else f"  mtp_acceptance: {found.mtp_acceptance:.3f}"
    return (
        f"held out: {step:>3}  loss: {found.loss:8.5f}  bits_per_byte: {found.bits_per_byte:.4f}{accepted}  "
        f"({units.plural(found.documents, 'document')}, {found.tokens:,} tokens)"
    )


def _step_to_resume(store: FolderStore, resume: Resume) -> int | None:
    """The step to go on from, None to begin: rank 0 looks, for others may still see what it is deleting."""
    steps = store.peers.first(store.steps)
    if steps and not resume.wanted:
        message = f"{store.folder} already holds step {steps[-1]}. Pass --resume to go on, or another --run."
        raise ConfigError(message)
    if resume.step is not None and resume.step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        message = f"{store.folder} has no step {resume.step}; it has {known}."
        raise CheckpointError(message)
    newest = steps[-1] if steps else None
    return newest if resume.step is None else resume.step


def _restore(trainer: Trainer, store: FolderStore, step: int | None, watcher: Watcher) -> int:
    """Load the checkpoint of `step` where there is one; return the step to go on from."""
    if step is None:
        watcher.note(f"no checkpoint in {store.folder}: starting at step 0")
        return 0
    trainer.restore(store.open(step))
    store.forget_after(step)
    last = trainer.config.train.steps
    done = "" if step < last else f"; train.steps = {last} are done: set more to train on"
    watcher.note(f"resumed from step {step} ({trainer.tokens:,} tokens){done}")
    return step


def _start_from(initial: Initial, trainer: Trainer, watcher: Watcher) -> None:
    """Load the checkpoint that the run continues, before its first step."""
    initial.load(trainer.stages, trainer.mesh.world)
    for note in (f"weights from {initial.opened.source.folder}", *initial.notes):
        watcher.note(note)


def _write_resolved(folder: Path, resolved: Resolved, facts: HardwareFacts) -> None:
    content = {
        "config": to_json(resolved.config),
        "why": [asdict(choice) for choice in resolved.choices],
        "hardware": asdict(facts),
    }
    replacement = folder / f"{RESOLVED}.tmp"
    replacement.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    replacement.replace(folder / RESOLVED)


def _describe(resolved: Resolved, trainer: Trainer, meta: Meta, watcher: Watcher) -> None:
    for choice in resolved.choices:
        watcher.note(f"{choice.field} = {choice.value}: {choice.reason}")
    config, total = resolved.config, sum(param.numel for param in parameters(resolved.config.model))
    tokens = planned_tokens(config)
    available = meta.splits["train"].tokens
    watcher.note(
        f"{config.model.name}: {total:,} parameters; {config.train.steps} steps of "
        f"{trainer.rows * number(config.train.seq_len):,} tokens = {tokens:,}, "
        f"{tokens / available:.2f} epochs of {available:,}"
    )
    if number(config.train.seq_len) > available:
        watcher.note(f"a row of {config.train.seq_len} tokens holds all {available:,} of the data and more")
    if meta.splits["held_out"].tokens == 0:
        watcher.note("the data holds no document out: nothing is evaluated. Build it with --held-out.")


def _watchdog(folder: Path, trainer: Trainer) -> Watchdog:
    rank, place = trainer.mesh.rank, trainer.mesh.place
    named = ", ".join(f"{axis} {index}" for axis, index in place._asdict().items())
    return Watchdog(
        trainer.config.train.stuck_s,
        folder / LOGS / f"stuck-rank-{rank}.txt",
        lambda: f"rank {rank} ({named}): {trainer.executor.pipeline.doing()}",
    )
