"""Peak memory of training, predicted beside what the trainer allocates: `python benchmarks/peaks.py`.

Every case is one step of one rank on torch's meta device with the choices of a GPU (`allocations.py`), in
seconds and without one: slices of Moonlight under the layouts of `train_ranks.py` and others, all of it, and
a rank of DeepSeek-V3's own run. Held against peaks measured on GPUs (`plan_accuracy.py`), what is traced is
0.1 to 1.1 % short: two workspaces of 32 MiB, rounding, and experts that are not loaded evenly. The prediction
keeps a reserve for the first two, which is in it here, and rows for the last, which are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))

from allocations import peak_of_a_step, write_documents
from moonlight_slices import LAYOUTS, moonlight, moonlight_slice
from provenance import write_result

from benthic.plan.training.candidate import PRECISIONS, Candidate, Numbers, Rows, Updates
from benthic.plan.training.memory import memory
from benthic.plan.training.phases import GPUS_OF_A_HOST
from benthic.spec import presets
from benthic.spec.layout import Layout
from benthic.train.config import (
    DataConfig,
    ExchangeConfig,
    LogConfig,
    LoopConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)

SEQ_LEN: Final = 4096
FP8: Final = Numbers(weights="fp8", matmul="fp8")
NARROW: Final = PRECISIONS["fp8"]
V3: Final = ("deepseek-v3",)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and which of its ranks is looked at.

    model: "slice", "six" layers of Moonlight, "whole", "dense", "mtp" or a preset. rows: of a step; local: of
    a microbatch. pp: pipeline rank.
    """

    model: str = "slice"
    layout: Layout = dataclasses.field(default_factory=Layout)
    rows: int = 8
    local: int = 1
    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    precision: Numbers = dataclasses.field(default_factory=Numbers)
    optimizer: str = "adamw"
    pp: int = 0

    @property
    def candidate(self) -> Candidate:
        """As the planner sees it."""
        return Candidate(
            model=_MODELS[self.model],
            layout=self.layout,
            train=Rows(seq_len=SEQ_LEN, local_batch_size=self.local, cuda_graph=False),  # traced as launched
            rows=self.rows,
            precision=self.precision,
            recompute=self.recompute,
            offload=self.offload,
            optimizer=Updates(name=self.optimizer),
            first_skew=1.0,  # without numbers every expert gets as many rows
        )

    @property
    def config(self) -> RunConfig:
        """As the trainer sees it, with nothing left to resolve."""
        numbers, ranks = self.precision, self.layout.ep_degree
        kind: Any = "local" if ranks == 1 else "nvlink" if ranks <= GPUS_OF_A_HOST else "all_to_all"
        words: dict[str, Any] = {"recompute": self.recompute, "offload": self.offload, "device": "meta"}
        return RunConfig(
            model=_MODELS[self.model],
            layout=self.layout,
            data=DataConfig(packing="stream", verify=False),
            train=LoopConfig(
                steps=1,
                seq_len=SEQ_LEN,
                local_batch_size=self.local,
                global_batch_size=self.rows,
                threads=1,
            ),
            optimizer=OptimizerConfig(name=self.optimizer, moment_dtype="bfloat16"),  # type: ignore[arg-type]
            precision=PrecisionConfig(**dataclasses.asdict(numbers)),
            exchange=ExchangeConfig(kind=kind, fp8=ranks > 1 and numbers.matmul == "fp8"),
            log=LogConfig(tensorboard=False, pictures=False),
            **words,
        )


_SLICE: Final = moonlight_slice()
_MODELS: Final = {
    "slice": _SLICE,
    "six": dataclasses.replace(moonlight(), num_hidden_layers=6),
    "whole": moonlight(),
    "dense": dataclasses.replace(_SLICE, first_k_dense_replace=4),
    "mtp": dataclasses.replace(_SLICE, num_nextn_predict_layers=1, q_lora_rank=768),
    "deepseek-v3": presets.get("deepseek-v3"),
}


def _cases() -> dict[str, Case]:
    again = ("attention", "experts")
    two, four = {"pp_degree": 2}, {"pp_degree": 4}
    found = {"1 rank": Case()} | {name: Case(layout=layout) for name, layout in LAYOUTS.items()}
    found |= {f"{name}, FP8": Case(layout=layout, precision=FP8) for name, layout in LAYOUTS.items()}
    found |= {
        "whole, ep2": Case(model="whole", layout=LAYOUTS["ep2"], local=8, rows=32, recompute=again),
        "six": Case(model="six", local=4, rows=4),
        "six, FP8": Case(model="six", local=4, rows=4, precision=FP8),
        "zero2": Case(layout=Layout(dp_degree=2, zero_stage=2)),
        "pp2 x zero2": Case(layout=Layout(dp_degree=2, zero_stage=2, **two), rows=16),
        "zb-h1 x zero2": Case(layout=Layout(dp_degree=2, zero_stage=2, schedule="zb-h1", **two), rows=16),
        "zero3 x ep2": Case(layout=Layout(dp_degree=4, ep_degree=2, zero_stage=3)),
        "ep2, expert_inputs, FP8": Case(layout=LAYOUTS["ep2"], recompute=("expert_inputs",), precision=FP8),
        "ep8, experts": Case(layout=Layout(dp_degree=8, ep_degree=8), rows=16, recompute=("experts",)),
        "ep8": Case(layout=Layout(dp_degree=8, ep_degree=8), rows=16),
        "ep16": Case(layout=Layout(dp_degree=16, ep_degree=16), rows=32),
        "interleaved": Case(layout=Layout(schedule="interleaved", virtual_stages=2, **two)),
        "chimera": Case(layout=Layout(schedule="chimera", **two)),
        "zb-v, last": Case(layout=Layout(schedule="zb-v", **two), pp=1),
        "pp4, second": Case(layout=Layout(**four), pp=1),
        "zb-h1 x 4, last": Case(layout=Layout(schedule="zb-h1", **four), pp=3),
        "zb-h1, last, FP8": Case(layout=LAYOUTS["zb-h1"], precision=FP8, pp=1),
        "dense": Case(model="dense", local=4),
        "dense, zb-h1, last": Case(model="dense", layout=LAYOUTS["zb-h1"], local=2, rows=16, pp=1),
        "prediction": Case(model="mtp", local=2),
        "prediction, pp2 x zero2": Case(
            model="mtp", layout=Layout(dp_degree=2, zero_stage=2, **two), rows=16, pp=1
        ),
        "muon": Case(optimizer="muon"),
        "muon, dp2": Case(optimizer="muon", layout=Layout(dp_degree=2)),
    }
    for pieces in (*((one,) for one in ("norms", "swiglu", "expert_outputs", "experts")), V3, again):
        name = " + ".join(pieces)
        found[f"six, {name}"] = Case(model="six", local=4, recompute=pieces)
        found[f"six, {name}, FP8"] = Case(model="six", local=4, recompute=pieces, precision=FP8)
    for phase in again:
        found[f"six, {phase} on the host"] = Case(model="six", local=4, offload=(phase,))
    for name in ("pp2", "ep2", "zb-h1", "dualpipev-ep2"):
        case = Case(layout=LAYOUTS[name], local=2, rows=16, recompute=V3, precision=NARROW)
        found[f"{name}, as DeepSeek-V3"] = case
    layout = Layout(pp_degree=16, dp_degree=128, ep_degree=64, schedule="dualpipe")
    full = Case(model="deepseek-v3", layout=layout, rows=128 * 40, recompute=V3, precision=NARROW)
    return found | {"DeepSeek-V3": full, "DeepSeek-V3, eighth": dataclasses.replace(full, pp=7)}


CASES: Final = _cases()


def main() -> None:
    """Every case, or some; printed and written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_documents(Path(folder) / "data")
        for name in words.only or CASES:
            predicted, traced = compared(CASES[name], data)
            off = predicted / traced - 1
            print(f"{name:<40} {predicted / 1e9:8.3f} {traced / 1e9:8.3f} GB {off:+7.1%}", flush=True)
            rows.append({"run": name, "predicted": predicted, "traced": traced})
    if not words.only:
        print(write_result("peaks", rows, out=words.out))


def compared(case: Case, data: Path) -> tuple[float, int]:
    """Predicted and traced bytes of a case's rank, without memory that peers write."""
    one = case.candidate
    found = memory(one, one.table())[case.pp]
    rank = case.layout.rank_at(case.pp, 0)
    return found.total - found.terms["exchange"], peak_of_a_step(case.config, data, rank)


if __name__ == "__main__":
    main()
