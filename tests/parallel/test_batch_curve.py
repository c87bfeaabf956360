"""A growing batch on several ranks: the pipeline follows tables of more and more microbatches."""

from __future__ import annotations

import pytest
from layouts import run_layouts, save, train, trainer_of
from spawn import spawn

from benthic.cli.settings import apply
from benthic.spec.layout import Layout
from benthic.train import recipes
from benthic.train.data import build, tokenizer
from benthic.train.data.documents import Corpus


@pytest.mark.dist
def test_pipeline_and_data_ranks_follow_one_process_while_the_batch_grows(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        lines = "".join(f"line {k * number} says {k + number} and {k * k}\n" for k in range(20))
        (corpus / f"{number}.txt").write_text(lines)
    rules = tokenizer.train((p.read_text() for p in sorted(corpus.iterdir())), 262)
    words = tokenizer.save(rules, tmp_path / "tokenizer", model_max_length=256)
    data = tmp_path / "set"
    build.build(Corpus(sources=(corpus,)), words, data, build.BuildOptions(held_out=0.1))
    settings = [
        "precision.weights=float32",
        "precision.matmul=float32",
        "train.seq_len=24",
        "train.local_batch_size=1",
        "train.batch_curve=4@96,8@192,12",
        "train.warmup_steps=0",
    ]
    config = apply(recipes.nano_test(), settings)
    serial = trainer_of(config, data)
    found = train(serial, 4, keep=(1, 4))
    assert serial.rows == 12
    layouts = [
        Layout(pp_degree=2, dp_degree=2, ep_degree=2),
        Layout(pp_degree=2, dp_degree=2, schedule="zb-h1"),
    ]
    path = save(found, tmp_path / "serial.pt")
    spawn(run_layouts, 4, config, layouts, str(data), str(path), (1e-4, 1e-3))
