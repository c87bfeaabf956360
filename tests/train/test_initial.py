"""Runs that start from a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.cli.settings import apply
from benthic.cli.train import _started
from benthic.errors import ConfigError, TensorMismatchError
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.train.data import tokenizer as tokenizers
from benthic.train.run import Resume, Run, prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.hardware import HardwareFacts


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, result: object, speed: object) -> None:
        pass


@pytest.fixture
def start(
    dataset: Path, facts: HardwareFacts, nano: RunConfig, tmp_path: Path
) -> Callable[..., tuple[Run, Silent]]:
    def make(checkpoint: Path | None, *settings: str, resume: bool = False) -> tuple[Run, Silent]:
        config = apply(_started(nano, checkpoint), ["train.steps=3", "train.warmup_steps=0", *settings])
        watcher = Silent()
        wanted = Resume(wanted=resume)
        stop = lambda: False  # noqa: E731
        run = prepare(tmp_path / "run", config, dataset, facts, watcher, resume=wanted, should_stop=stop)
        return run, watcher

    return make


def export(config: RunConfig, folder: Path, seed: int = 7, **changes: object) -> DeepSeek:
    model = DeepSeek(dataclasses.replace(config.model, **changes))
    initialise(model, seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("gate.bias"):
            tensor.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(seed))
    save_pretrained(model, folder, dtype=torch.float32)
    return model


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_run_starts_from_the_checkpoints_weights_and_says_so(start, nano, tmp_path, weights) -> None:
    model = export(nano, tmp_path / "hf")
    run, watcher = start(tmp_path / "hf", f"precision.weights={weights}")
    for name, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    masters = {p.name: p.master for bucket in run.trainer.buckets for p in bucket.pieces()}
    for name, parameter in model.named_parameters():
        assert torch.equal(masters[name].view(parameter.shape), parameter), name
    assert any(str(tmp_path / "hf") in note for note in watcher.notes)
    assert run.go()


def test_finished_run_exports_what_load_pretrained_reads(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf")
    run, _ = start(tmp_path / "hf", "checkpoint.export=true", "checkpoint.export_dtype=float32")
    assert run.go()
    again = load_pretrained(run.folder / "hf").state_dict()
    for name, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    assert (run.folder / "hf" / "tokenizer.json").is_file()


def test_resumed_run_needs_the_initial_checkpoint_no_more(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf")
    run, _ = start(tmp_path / "hf", "checkpoint.every=1")
    run.trainer.step()
    run.store.save(run.trainer.saved())
    shutil.rmtree(tmp_path / "hf")
    again, watcher = start(None, f"init_from={tmp_path / 'hf'}", resume=True)
    assert "resumed from step 1" in "\n".join(watcher.notes)
    for name, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(again.trainer.model.state_dict()[name], tensor)


def test_recipe_that_disagrees_with_the_checkpoint_names_every_field(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf", moe_intermediate_size=24, routed_scaling_factor=1.25)
    with pytest.raises(ConfigError) as caught:
        start(None, f"init_from={tmp_path / 'hf'}")
    for words in (
        "model.moe_intermediate_size=16, but its config.json says 24",
        "model.routed_scaling_factor=1.5, but its config.json says 1.25",
        "--init-from",
    ):
        assert words in str(caught.value)
    start(tmp_path / "hf")


def test_a_longer_context_may_be_set_and_is_noted(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf")
    _, watcher = start(tmp_path / "hf", "model.max_position_embeddings=512")
    assert "model.max_position_embeddings = 512: the checkpoint has 256" in watcher.notes


def test_missing_mtp_layers_are_refused_with_both_remedies_and_taken_fresh_when_asked(
    start, nano, tmp_path
) -> None:
    model = export(nano, tmp_path / "hf", num_nextn_predict_layers=0)
    deeper = "model.num_nextn_predict_layers=1"
    with pytest.raises(ConfigError, match=r"=1, but it has 0 .*=0 to train without, or init_mtp=fresh"):
        start(tmp_path / "hf", deeper)
    run, _ = start(tmp_path / "hf", deeper, "init_mtp=fresh")
    state = run.trainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(name.startswith("mtp.") for name in state) > 10


def test_mtp_layers_of_the_checkpoint_can_be_left_unread(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf")
    run, _ = start(tmp_path / "hf", "model.num_nextn_predict_layers=0")
    assert not run.trainer.model.mtp
    assert run.go()


def test_other_special_ids_and_a_larger_vocabulary_are_refused_before_anything_is_read(
    start, nano, tmp_path
) -> None:
    export(nano, tmp_path / "hf", bos_token_id=5, eos_token_id=9, vocab_size=300)
    with pytest.raises(ConfigError) as caught:
        start(tmp_path / "hf")
    for words in (
        "eos_token_id=1, but the model to continue has 9",
        "bos_token_id=0, but the model to continue has 5",
        "320 tokens, but model.vocab_size=300",
    ):
        assert words in str(caught.value)


def test_another_tokenizer_of_the_same_size_is_refused_with_the_first_token_that_differs(
    start, nano, dataset, tmp_path
) -> None:
    export(nano, tmp_path / "hf")
    tokenizers.copy(dataset / "tokenizer", tmp_path / "hf")
    start(tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    vocabulary = tokenizers.load_rules(tmp_path / "hf").get_vocab()
    one, two = (next(t for t, i in vocabulary.items() if i == n) for n in (40, 41))
    text = file.read_text()
    text = text.replace(f'"{one}": 40', f'"{one}": 41').replace(f'"{two}": 41', f'"{two}": 40')
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"2 of the 320 tokens .* id 40 in the data, 41 in the checkpoint"):
        start(tmp_path / "hf")


def test_checkpoint_that_announces_layers_it_lacks_is_refused(start, nano, tmp_path) -> None:
    export(nano, tmp_path / "hf", num_nextn_predict_layers=0)
    config = tmp_path / "hf" / "config.json"
    config.write_text(
        config.read_text().replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1')
    )
    with pytest.raises(TensorMismatchError, match="missing"):
        start(tmp_path / "hf")
    start(tmp_path / "hf", "init_mtp=fresh")
