from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import BASE, VARIANTS, packed, random_model

from benthic.errors import CheckpointError, ConfigError, NotACheckpointError, TensorMismatchError
from benthic.kernels import ops
from benthic.model import shard_writer
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.part import Part
from benthic.model.shard_writer import Planned, ShardWriter, split
from benthic.spec.parameters import parameters
from benthic.spec.totals import checkpoint_bytes, checkpoint_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.model.network import DeepSeek

MTP = replace(BASE, num_nextn_predict_layers=1)
# Wider than one FP8 block in places, so that scales, padding and rotary rows are all exercised.
WIDE = replace(
    MTP,
    hidden_size=160,
    intermediate_size=200,
    moe_intermediate_size=136,
    kv_lora_rank=120,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    q_lora_rank=130,
)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of the small model with MTP, in one float32 file."""
    save_pretrained(random_model(MTP), tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_same(one: DeepSeek, other: DeepSeek) -> None:
    state = other.state_dict()
    assert list(one.state_dict()) == list(state)
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("name", [*VARIANTS, "MTP"])
@pytest.mark.parametrize("shard", [20_000, 10**9])
def test_float32_round_trip_is_exact(name, shard, tmp_path):
    model = random_model(MTP if name == "MTP" else VARIANTS[name])
    save_pretrained(model, tmp_path, dtype=torch.float32, max_shard_bytes=shard)
    again = load_pretrained(tmp_path)
    assert again.config == replace(model.config, name=tmp_path.name)
    assert_same(again, model)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_bfloat16_round_trip_rounds_once_and_keeps_float32_biases(tmp_path):
    model = random_model(MTP)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        biased = name.endswith("gate.bias")
        assert torch.equal(again[name], tensor if biased else tensor.bfloat16()), name
    wide = load_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_fp8_round_trip_stays_within_quantisation_error(tmp_path):
    model = random_model(WIDE)
    save_pretrained(model, tmp_path, fp8=True)
    again = load_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for param in parameters(WIDE):
        before, after = model.state_dict()[param.name], again[param.name]
        if param.hf[0].precision != "fp8":
            rounded = before if param.hf[0].precision == "fp32" else before.bfloat16().float()
            assert torch.equal(after, rounded), param.name
            continue
        # E4M3 has 3 mantissa bits: half a step is 1/16 of a value, and 2^-10 of the scale near 0.
        largest = before.abs().max()
        assert ((after - before).abs() <= before.abs() / 16 + largest / 448 * 2**-10).all(), param.name
        assert not torch.equal(after, before)


def test_fp8_files_have_the_layout_of_released_checkpoints(tmp_path):
    model = random_model(WIDE)
    save_pretrained(model, tmp_path, fp8=True)
    stored = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    scale = stored["model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"]
    weight = stored["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert (weight.shape, weight.dtype) == ((160, 136), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((2, 2), torch.float32)
    module = model.state_dict()["layers.1.moe.experts.down"][2]
    torch.testing.assert_close(scale[1, 1], module[128:, 128:].abs().max() / 448)
    assert stored["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert sum(t.nbytes for t in stored.values()) == checkpoint_bytes(WIDE, fp8=True)


def test_fp8_weights_are_quantised_as_the_checkpoint_lays_them_out_not_as_the_module_does(tmp_path):
    """Rotary rows move between layouts; scales belong to blocks of the file's rows."""
    model = random_model(WIDE)
    save_pretrained(model, tmp_path / "wide", dtype=torch.float32)
    save_pretrained(model, tmp_path / "fp8", fp8=True)
    name = "model.layers.0.self_attn.q_b_proj.weight"
    expected = ops.quantise_fp8_blocks(load_file(tmp_path / "wide" / "model.safetensors")[name])
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert torch.equal(stored[name].float(), expected[0].float())
    assert torch.equal(stored[f"{name}_scale_inv"], expected[1])


def test_files_hold_the_tensors_of_the_table_and_no_other(folder):
    stored = load_file(folder / "model.safetensors")
    assert {(name, tuple(t.shape)) for name, t in stored.items()} == {
        (t.name, t.shape) for t in checkpoint_tensors(MTP)
    }


def test_shards_respect_their_limit_and_the_index_names_every_tensor(tmp_path):
    save_pretrained(random_model(MTP), tmp_path, dtype=torch.float32, max_shard_bytes=25_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel for t in checkpoint_tensors(MTP)) * 4
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as handle:
            names = list(handle.keys())
            size = sum(handle.get_tensor(name).nbytes for name in names)
        assert size <= 25_000 or len(names) == 1
        assert all(index["weight_map"][name] == file for name in names)


def test_a_part_reads_only_its_own_tensors(folder):
    part = Part(layers=(1,), embed=True)
    whole, loaded = load_pretrained(folder), load_pretrained(folder, part=part)
    assert set(loaded.state_dict()) == {name for name in whole.state_dict() if part.holds(name)}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])
    with pytest.raises(CheckpointError, match="3 layers and all else, this instance has 1"):
        save_pretrained(loaded, folder.parent / "part")


def test_mtp_layers_can_be_left_out_whether_or_not_they_are_stored(folder):
    loaded = load_pretrained(folder, mtp=False)
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(loaded.mtp) == 0
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    assert_same(load_pretrained(folder, mtp=False), loaded)
    with pytest.raises(TensorMismatchError, match=r"Only MTP layers are missing: load with mtp=False"):
        load_pretrained(folder)


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(folder):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(97, 47)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(48, 80, dtype=torch.int32)

    rewrite(folder, spoil)
    with pytest.raises(TensorMismatchError) as error:
        load_pretrained(folder)
    text = str(error.value)
    assert "2 missing, 1 misshapen, 1 stored in a type that is not a weight's, 1 unexpected" in text
    assert "missing: model.layers.1.mlp.experts.4.up_proj.weight, model.norm.weight" in text.replace(
        "model.norm.weight, model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.1.mlp.experts.4.up_proj.weight, model.norm.weight",
    )
    assert "lm_head.weight (stored [97, 47], config says [97, 48])" in text
    assert "model.layers.0.mlp.down_proj.weight (I32)" in text
    assert "unexpected: model.layers.0.self_attn.q_norm.weight" in text


def test_rotary_frequencies_of_old_exports_are_ignored(folder):
    expected = load_pretrained(folder)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same(load_pretrained(folder), expected)


def test_copies_of_shared_tensors_may_be_absent_but_not_different(folder):
    expected = load_pretrained(folder)
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    rewrite(folder, lambda t: t[copies[0]].add_(1))
    with pytest.raises(
        TensorMismatchError, match=r"embed_tokens.weight \(a copy of model.embed_tokens.weight\)"
    ):
        load_pretrained(folder)
    rewrite(folder, lambda t: [t.pop(name) for name in copies])
    assert_same(load_pretrained(folder), expected)


def test_a_tied_head_may_be_stored_but_must_equal_the_embedding(tmp_path):
    save_pretrained(random_model(replace(MTP, tie_word_embeddings=True)), tmp_path, dtype=torch.float32)
    expected = load_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(load_pretrained(tmp_path), expected)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].zero_())
    with pytest.raises(TensorMismatchError, match=r"lm_head\.weight"):
        load_pretrained(tmp_path)


def test_fp8_weight_without_its_scale_is_named(tmp_path):
    save_pretrained(random_model(MTP), tmp_path, fp8=True)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    rewrite(tmp_path, lambda t: t.pop(name))
    with pytest.raises(TensorMismatchError, match=rf"{name} \(missing, but the weight is FP8\)"):
        load_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(2, 1)}))
    with pytest.raises(TensorMismatchError, match=r"stored \[2, 1\], blocks of 128 need \[1, 1\]"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 20, 5_000, -1])
def test_truncated_file_is_refused_with_its_name_and_both_sizes(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    size = len(whole[:kept])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated.*found {size}") as error:
        load_pretrained(folder)
    if kept in (5_000, -1) and "header alone" not in str(error.value):
        assert f"expected {len(whole)} bytes" in str(error.value)


def test_file_that_is_not_safetensors_is_refused(folder):
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 20)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"<html>" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_pretrained(folder)


def test_missing_shard_is_named(tmp_path):
    save_pretrained(random_model(MTP), tmp_path, dtype=torch.float32, max_shard_bytes=100_000)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        load_pretrained(tmp_path)


def test_index_that_misplaces_a_tensor_is_refused(tmp_path):
    save_pretrained(random_model(MTP), tmp_path, dtype=torch.float32, max_shard_bytes=100_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors where they are not: model\.norm\.weight"):
        load_pretrained(tmp_path)


def test_what_is_not_a_checkpoint_is_refused_saying_what_was_looked_for(tmp_path, folder):
    with pytest.raises(NotACheckpointError, match=r"is not a folder; looked for config\.json"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(NotACheckpointError, match=r"looked for config\.json, found .*notes\.txt"):
        load_pretrained(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(NotACheckpointError, match=r"pytorch_model\.bin but no model\.safetensors"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(NotACheckpointError, match="is not JSON"):
        load_pretrained(folder)


def test_config_of_another_shape_or_quantisation_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_attention_heads": 4}))
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        load_pretrained(folder)
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quant_method='awq'"):
        load_pretrained(folder)


def test_folder_that_holds_a_checkpoint_is_not_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"already holds a checkpoint \(config\.json, model\.safetensors\)"
    ):
        save_pretrained(random_model(BASE), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_other_files_of_the_target_folder_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(random_model(BASE), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_full_disk_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_finish", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_pretrained(random_model(BASE), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_room_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, the disk has 50 free"):
        save_pretrained(random_model(BASE), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_middle_leaves_no_half_checkpoint(tmp_path):
    def interrupt(progress):
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pretrained(random_model(BASE), tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte_in_both_directions(tmp_path):
    saved, loaded = [], []
    save_pretrained(random_model(MTP), tmp_path, progress=saved.append)
    load_pretrained(tmp_path, progress=loaded.append)
    for seen in (saved, loaded):
        done = [progress.done_bytes for progress in seen]
        assert done == sorted(done)
        assert done[-1] == seen[-1].total_bytes
    assert len(saved) == len(checkpoint_tensors(MTP))
    assert [progress.name for progress in loaded] == [param.name for param in parameters(MTP)]


def test_extra_config_fields_are_written(tmp_path):
    save_pretrained(
        random_model(BASE), tmp_path, config_extra={"transformers_version": "5.0", "bos_token_id": 7}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["transformers_version"], config["bos_token_id"]) == ("5.0", 7)


def test_loaded_model_does_not_depend_on_its_files(folder):
    model = load_pretrained(folder)
    tokens_T, positions_T, _, sockets = packed(MTP)
    with torch.no_grad():
        before = model(tokens_T, positions_T, sockets).hidden_TD
        (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
        assert torch.equal(model(tokens_T, positions_T, sockets).hidden_TD, before)


def test_writer_refuses_tensors_that_were_not_planned_or_never_came(tmp_path):
    planned = [Planned("a", torch.float32, (2,)), Planned("b", torch.bfloat16, (3,))]
    with (
        pytest.raises(CheckpointError, match=r"a: writing torch\.bfloat16"),
        ShardWriter(tmp_path, planned, 10**6) as writer,
    ):
        writer.write("a", torch.zeros(2, dtype=torch.bfloat16))
    with (
        pytest.raises(CheckpointError, match="1 tensors were never written: b"),
        ShardWriter(tmp_path, planned, 10**6) as writer,
    ):
        writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_odd_sized_narrow_tensors_do_not_misalign_wide_ones(tmp_path):
    planned = [
        Planned("byte", torch.float8_e4m3fn, (3, 1)),
        Planned("half", torch.bfloat16, (3,)),
        Planned("word", torch.float32, (2,)),
    ]
    with ShardWriter(tmp_path, planned, 10**6) as writer:
        writer.write("byte", torch.tensor([[1.0], [2.0], [-3.0]]).to(torch.float8_e4m3fn))
        writer.write("word", torch.tensor([0.5, 0.25]))
        writer.write("half", torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["byte"].float().flatten().tolist() == [1.0, 2.0, -3.0]
    assert stored["half"].tolist() == [1.0, 2.0, 3.0]
    assert stored["word"].tolist() == [0.5, 0.25]


def test_shards_fill_in_order_and_a_large_tensor_stands_alone():
    sizes = [40, 40, 300, 10, 10, 90]
    planned = [Planned(str(i), torch.float8_e4m3fn, (size,)) for i, size in enumerate(sizes)]
    assert [[t.name for t in shard] for shard in split(planned, 100)] == [
        ["0", "1"],
        ["2"],
        ["3", "4"],
        ["5"],
    ]
    with pytest.raises(CheckpointError, match="max_shard_bytes = 0"):
        split(planned, 0)


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_not_disturbed(tmp_path):
    dead = tmp_path / ".partial-1"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    planned = [Planned("a", torch.float32, (2,))]
    with ShardWriter(tmp_path, planned, 10**6) as living:
        assert not dead.exists()
        partial = living._partial
        partial.rename(tmp_path / ".partial-elsewhere")
        with ShardWriter(tmp_path, planned, 10**6) as other:
            assert (tmp_path / ".partial-elsewhere").exists()
            other.write("a", torch.ones(2))
        (tmp_path / ".partial-elsewhere").rename(partial)
        living.write("a", torch.zeros(2))
        with pytest.raises(CheckpointError, match="already holds a checkpoint"):
            living._finish()
        living._places, living._finish = {}, lambda: None
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save_pretrained(random_model(BASE), tmp_path / "file")
    with pytest.raises(CheckpointError, match="writing the checkpoint failed"):
        save_pretrained(random_model(BASE), tmp_path / "file" / "below")
