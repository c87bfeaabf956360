"""Serving throughput on a CPU: this engine beside `transformers` `generate`, on the same exported weights.

    python benchmarks/serve_cpu.py [--checkpoint DIR] [--threads 1 2] [--rounds 6 30] [--profile]

Sixteen requests of ragged prompts, greedy, a fixed number of new tokens each, end tokens ignored. The rate is
generated tokens over the wall time from the first request's arrival to the last token, prefill included.

benthic        all requests at once through `Engine.add` and `Engine.step` (what `benthic serve` runs)
batched        `generate` on all requests in one left-padded batch, its cache on, SDPA attention
one by one     `generate` on one request after another, without padding

`transformers` is measured with every implementation of its experts and both sides with every number of
threads. Everything runs once to warm up and once to be screened; what is within a third of its side's fastest
goes on. Rounds then alternate between the sides, so a busy machine disturbs both, until the 95 % interval of
the ratio (bootstrap over rounds of the ratio of the best medians) is within `--precision` of it, or the most
rounds are done. The tokens of both sides are compared: they must agree but for rounding.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interval import Ratio, ratio_of_best
from provenance import write_result

from benthic.kernels import ops
from benthic.model.checkpoint import save_pretrained
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.serve.engine import Engine
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.spec import presets

Tokens = list[list[int]]
EXPERTS = ("eager", "grouped_mm", "batched_mm")


def export(folder: Path, preset: str) -> Path:
    """A randomly initialised model as a Hugging Face checkpoint, float32."""
    model = DeepSeek(presets.get(preset))
    initialise(model, seed=0)
    save_pretrained(model, folder, dtype=torch.float32)
    return folder


def make_prompts(count: int, shortest: int, longest: int, vocab_size: int) -> Tokens:
    """Random prompts whose lengths run evenly from `shortest` to `longest`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, count).long().tolist()
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


class Ours:
    """The engine, loaded once; its prefix cache is off so that later rounds compute as much as the first."""

    def __init__(self, folder: Path, prompts: Tokens, new_tokens: int) -> None:
        longest = max(map(len, prompts)) + new_tokens
        options = EngineOptions(max_num_seqs=len(prompts), max_model_len=longest, enable_prefix_caching=False)
        self.engine = Engine.from_pretrained(folder, options)
        self.params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        self.prompts = prompts

    def __call__(self) -> Tokens:
        """Serve all requests once."""
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            self.engine.add(Generate(request_id=str(i), prompt=tuple(prompt), params=self.params))
            found[str(i)] = []
        while self.engine.has_work:
            for delta in self.engine.step():
                found[delta.request_id].extend(delta.tokens)
        return list(found.values())


class Theirs:
    """`transformers` with one implementation of the experts."""

    def __init__(self, folder: Path, prompts: Tokens, new_tokens: int, experts: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        ).eval()
        self.prompts = prompts
        self.new_tokens = new_tokens

    def batched(self) -> Tokens:
        """All requests in one batch, padded on the left."""
        longest = max(map(len, self.prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in self.prompts]
        kept = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        return self._generate(padded, kept)

    def one_by_one(self) -> Tokens:
        """One request after another."""
        return [self._generate([prompt], [[1] * len(prompt)])[0] for prompt in self.prompts]

    def _generate(self, tokens: Tokens, kept: Tokens) -> Tokens:
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(kept),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return out[:, len(tokens[0]) :].tolist()


Candidate = tuple[str, int, Callable[[], Tokens]]


def candidates(folder: Path, prompts: Tokens, args: argparse.Namespace) -> list[Candidate]:
    """Everything that is timed: name, threads, how to run it."""
    ours = Ours(folder, prompts, args.new_tokens)
    found: list[Candidate] = [("benthic", threads, ours) for threads in args.threads]
    for experts in EXPERTS:
        theirs = Theirs(folder, prompts, args.new_tokens, experts)
        found += [(f"transformers batched, experts {experts}", n, theirs.batched) for n in args.threads]
        if experts == EXPERTS[0]:
            found.append(("transformers one by one", max(args.threads), theirs.one_by_one))
    return found


@dataclass
class Timed:
    """What one run took: seconds on the wall, seconds of all cores, and what came out."""

    wall_s: float
    cpu_s: float
    tokens: Tokens


def timed(candidate: Candidate) -> Timed:
    """Run once."""
    _, threads, run = candidate
    torch.set_num_threads(threads)
    began, began_cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return Timed(time.perf_counter() - began, time.process_time() - began_cpu, tokens)


CLOSE = 1.33
"""A candidate that takes this many times as long as its side's fastest is screened only."""

ROUND_S = 1.0
"""What a candidate runs for in a round, at least."""


@dataclass
class Measured:
    """One candidate: its screening run and its mean seconds in every round."""

    candidate: Candidate
    screened: Timed
    wall_s: list[float]
    cpu_s: list[float]

    @property
    def side(self) -> str:
        """`benthic` or `transformers`."""
        return self.candidate[0].split()[0]

    @property
    def median_s(self) -> float:
        """Seconds of a run: the median round's, or the screening run's if it was not in any."""
        return statistics.median(self.wall_s) if self.wall_s else self.screened.wall_s

    def time_round(self) -> None:
        """Run for about `ROUND_S`."""
        count = max(1, round(ROUND_S / self.screened.wall_s))
        runs = [timed(self.candidate) for _ in range(count)]
        self.wall_s.append(statistics.mean(run.wall_s for run in runs))
        self.cpu_s.append(statistics.mean(run.cpu_s for run in runs))


def screen(found: list[Candidate], patience_s: float) -> list[Measured]:
    """Time everything once, warm unless one run took `patience_s`."""
    screened = []
    for candidate in found:
        first = timed(candidate)
        screened.append(Measured(candidate, first if first.wall_s > patience_s else timed(candidate), [], []))
    return screened


def finalists(measured: list[Measured], side: str) -> list[Measured]:
    """The candidates of a side that are close to its fastest."""
    mine = [each for each in measured if each.side == side]
    fastest = min(each.screened.wall_s for each in mine)
    return [each for each in mine if each.screened.wall_s <= CLOSE * fastest]


def compare(measured: list[Measured], rounds: tuple[int, int], precision: float) -> Ratio:
    """Alternate between the sides' finalists until the ratio is known to `precision`."""
    ours, theirs = finalists(measured, "benthic"), finalists(measured, "transformers")
    fewest, most = rounds
    while True:
        for each in (*ours, *theirs):
            each.time_round()
        done = len(ours[0].wall_s)
        ratio = ratio_of_best([each.wall_s for each in ours], [each.wall_s for each in theirs])
        if done >= most or (done >= fewest and ratio.spread <= precision):
            return ratio
        print(f"round {done}: {ratio}x", flush=True)


def row(measured: Measured, ours: Tokens) -> dict[str, Any]:
    """One line of the result."""
    tokens = measured.screened.tokens
    cpu_s = measured.cpu_s or [measured.screened.cpu_s]
    return {
        "name": measured.candidate[0],
        "threads": measured.candidate[1],
        "tokens_per_s": round(sum(map(len, tokens)) / measured.median_s, 1),
        "rounds": len(measured.wall_s),
        "wall_s": [round(seconds, 3) for seconds in measured.wall_s or [measured.screened.wall_s]],
        "cpu_s": [round(seconds, 3) for seconds in cpu_s],
        "requests_with_equal_tokens": sum(a == b for a, b in zip(tokens, ours, strict=True)),
        "equal_tokens_share": round(shared_prefix(tokens, ours), 4),
    }


def shared_prefix(a: Tokens, b: Tokens) -> float:
    """Share of tokens before the first difference of each request (greedy decoding forks at a near tie)."""
    same = [
        next((i for i, (x, y) in enumerate(zip(p, q, strict=True)) if x != y), len(p))
        for p, q in zip(a, b, strict=True)
    ]
    return sum(same) / sum(map(len, a))


def report(rows: list[dict[str, Any]], ratio: Ratio) -> dict[str, Any]:
    """Print the table; returns the ratios of the best of each side."""
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        print(
            f"{row['name']:42} {row['threads']} threads {row['tokens_per_s']:9,.1f} tok/s  "
            f"{min(row['cpu_s']):7.2f} core-s  {row['rounds']:2} rounds  "
            f"tokens equal to ours: {row['equal_tokens_share']:.1%}"
        )
    best = {
        side: max(row["tokens_per_s"] for row in rows if row["name"].startswith(side))
        for side in ("benthic", "transformers one")
    }
    one_by_one = round(best["benthic"] / best["transformers one"], 2)
    print(f"over transformers at its best: {ratio}x (95 % interval); one by one: {one_by_one}x")
    return {
        "over_transformers_at_its_best": round(ratio.value, 2),
        "interval_95": [round(ratio.low, 2), round(ratio.high, 2)],
        "over_transformers_one_by_one": one_by_one,
    }


def profile(ours: Ours, threads: int) -> None:
    """Where a run of ours spends its time: by Python function, then inside one taped decode step."""
    import cProfile
    import pstats

    torch.set_num_threads(threads)
    ours()
    watch = cProfile.Profile()
    watch.runcall(ours)
    pstats.Stats(watch).sort_stats("tottime").print_stats(20)
    for sequences, spent in ours.engine.profile_tapes(time.perf_counter).items():
        parts = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in spent.items())
        print(f"a step of {sequences} sequences, {sum(spent.values()) * 1e6:.0f} us: {parts}")


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face folder; default: the preset, random")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 96), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, nargs=2, default=(6, 30), metavar=("FEWEST", "MOST"))
    parser.add_argument("--precision", type=float, default=0.03, help="half the interval over the ratio")
    parser.add_argument("--patience", type=float, default=20.0, help="a longer run is not repeated, seconds")
    parser.add_argument("--profile", action="store_true", help="print where our time goes, and stop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = [round(each, 2) for each in os.getloadavg()]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or export(Path(folder) / args.preset, args.preset)
        ours = Engine.from_pretrained(checkpoint, EngineOptions()).ready()
        prompts = make_prompts(args.requests, *args.prompt, ours.vocab_size)
        if args.profile:
            profile(Ours(checkpoint, prompts, args.new_tokens), max(args.threads))
            return
        measured = screen(candidates(checkpoint, prompts, args), args.patience)
        ratio = compare(measured, tuple(args.rounds), args.precision)
    rows = [row(each, measured[0].screened.tokens) for each in measured]
    ratios = report(rows, ratio)
    path = write_result(
        "serve_cpu",
        rows,
        out=args.out,
        model=str(args.checkpoint or args.preset),
        requests=args.requests,
        prompt_tokens=list(args.prompt),
        new_tokens=args.new_tokens,
        load_average_before=load,
        load_average_after=[round(each, 2) for each in os.getloadavg()],
        precision=args.precision,
        ops={choice.op: choice.implementation for choice in ops.explain("cpu", torch.float32)},
        **ratios,
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
