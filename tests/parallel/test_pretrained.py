"""Hugging Face checkpoints into a layout and out of it again, against one process."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import BASE, random_model
from spawn import spawn

from benthic.errors import CheckpointError, TensorMismatchError
from benthic.model import region
from benthic.model.checkpoint import load_pretrained, open_checkpoint, save_pretrained
from benthic.parallel.export import save_stages
from benthic.parallel.mesh import Mesh
from benthic.parallel.pretrained import load_stages
from benthic.parallel.stages import build
from benthic.sched.pipeline import schedules
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters
from benthic.train.precision import keep_weights

# Wider than one FP8 block in places and nowhere a multiple of one; heads and columns divide by two.
CONFIG = replace(
    BASE,
    num_nextn_predict_layers=1,
    num_hidden_layers=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    hidden_size=160,
    intermediate_size=200,
    moe_intermediate_size=136,
    num_attention_heads=4,
    kv_lora_rank=120,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    q_lora_rank=130,
)
LAYOUTS = [
    Layout(pp_degree=2, dp_degree=2, ep_degree=2),
    Layout(dp_degree=4, ep_degree=2, zero_stage=3),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, zero_stage=2, schedule="dualpipe"),
    Layout(dp_degree=2, tp_degree=2, ep_degree=4),
]
FORMS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "fp8": (torch.bfloat16, True),
}
ALONE = Layout()


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "fp8"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model"
    save_pretrained(
        random_model(CONFIG), path, dtype=torch.float32, fp8=request.param, max_shard_bytes=300_000
    )
    return path


def stages_of(mesh: Mesh, weights: str = "float32", *, split: bool = False):
    table = schedules.build(mesh.layout.schedule, mesh.layout.pp_degree, 4)
    keep = functools.partial(keep_weights, weights=weights)
    return build(CONFIG, table, mesh, device=torch.device("cpu"), keep=keep, seed=1, split=split)


def masters(stages):
    return {p.name: p for bucket in stages.all_buckets for p in bucket.pieces()}


def round_trip(rank: int, source: str, target: str) -> None:
    whole = load_pretrained(source, dtype=torch.float32).state_dict()
    params = {p.name: p for p in parameters(CONFIG)}
    for number, layout in enumerate(LAYOUTS):
        mesh = Mesh.of(layout, rank)
        for weights, split in (("bfloat16", False), ("fp8", True), ("float32", False)):
            stages = stages_of(mesh, weights, split=split)
            load_stages(open_checkpoint(Path(source)), stages, mesh.world)
            for name, piece in masters(stages).items():
                local = whole[name][box(params[name], layout, mesh.place)].flatten()
                assert torch.equal(piece.master, local[piece.start : piece.stop]), (layout, name)
            for name, bias in stages.named_buffers().items():
                assert torch.equal(bias, whole[name])
            if weights == "fp8":  # float32 and bfloat16 parameters side by side
                save_stages(stages, mesh, CONFIG, Path(target) / f"{number}-mixed", max_shard_bytes=300_000)
        for form, (dtype, fp8) in FORMS.items():
            folder = Path(target) / f"{number}-{form}"
            save_stages(stages, mesh, CONFIG, folder, dtype=dtype, fp8=fp8, max_shard_bytes=300_000)


@pytest.mark.dist
def test_every_layout_reads_its_parts_and_exports_the_files_of_one_process(folder, tmp_path):
    spawn(round_trip, 4, str(folder), str(tmp_path / "out"))
    model = load_pretrained(folder, dtype=torch.float32)
    model.config = CONFIG
    for form, (dtype, fp8) in FORMS.items():
        expected = tmp_path / form
        save_pretrained(model, expected, dtype=dtype, fp8=fp8, max_shard_bytes=300_000)
        names = sorted(path.name for path in expected.iterdir())
        assert len(names) > 3
        kept = [form, "mixed"] if form == "bfloat16" else [form]
        for number, form_kept in itertools.product(range(len(LAYOUTS)), kept):
            found = tmp_path / "out" / f"{number}-{form_kept}"
            assert sorted(path.name for path in found.iterdir()) == names
            for name in names:
                assert (found / name).read_bytes() == (expected / name).read_bytes(), (LAYOUTS[number], name)
    load_in_transformers(tmp_path / "out" / "0-float32")


def load_in_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _, report = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]


def refused_export(rank: int, taken: str) -> None:
    mesh = Mesh.of(Layout(dp_degree=2), rank)
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        save_stages(stages_of(mesh), mesh, CONFIG, Path(taken))


@pytest.mark.dist
def test_every_rank_fails_when_rank_0_cannot_write(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    spawn(refused_export, 2, str(tmp_path))


def differing_copy(rank: int, source: str) -> None:
    mesh = Mesh.of(Layout(dp_degree=2), rank)
    with pytest.raises(TensorMismatchError, match=r"1 tensors differ .*layers\.2\.embed_tokens"):
        load_stages(open_checkpoint(Path(source)), stages_of(mesh), mesh.world)


@pytest.mark.dist
def test_a_copy_that_differs_on_one_ranks_stretch_is_refused_on_every_rank(tmp_path):
    save_pretrained(random_model(CONFIG), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.2.embed_tokens.weight"][0, 0] += 1.0
    save_file(tensors, file)
    spawn(differing_copy, 2, str(tmp_path / "model"))


def test_a_shard_reads_only_its_own_rows(tmp_path, monkeypatch):
    """Rank 1 of 2 holds half of every bucket: it must not touch all rows of all tensors."""
    save_pretrained(random_model(CONFIG), tmp_path, dtype=torch.float32)
    read = []
    monkeypatch.setattr(
        "benthic.model.region.read_region",
        lambda source, name, part, device: read.append((name, part)) or source.read(name)[part].to(device),
    )
    mesh = Mesh.of(ALONE, 0)
    stages = stages_of(mesh)
    bucket = stages.buckets["layers.1"][-1]
    params = {p.name: p for p in parameters(CONFIG)}
    with open_checkpoint(tmp_path).source as source:
        for name, tensor in bucket.params.items():
            half = tensor.numel() // 2
            for found in region.stretches(params[name], stages.boxes[name], half, tensor.numel()):
                region.read_stretch(
                    source,
                    found.tensor.name,
                    params[name],
                    found,
                    interleaved=True,
                    device=torch.device("cpu"),
                )
    experts = {int(name.split(".")[5]) for name, _ in read if ".experts." in name}
    assert experts == {2, 3}


def test_mtp_modules_that_a_checkpoint_lacks_stay_as_they_were_initialised(tmp_path):
    save_pretrained(random_model(replace(CONFIG, num_nextn_predict_layers=0)), tmp_path, dtype=torch.float32)
    stages = stages_of(Mesh.of(ALONE, 0))
    before = {name: piece.master.clone() for name, piece in masters(stages).items()}
    load_stages(open_checkpoint(tmp_path, mtp=False), stages, Mesh.of(ALONE, 0).world)
    for name, piece in masters(stages).items():
        assert torch.equal(piece.master, before[name]) == name.startswith("mtp."), name
