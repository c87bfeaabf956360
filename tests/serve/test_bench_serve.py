"""`benthic bench serve` against our own server with a real (small) model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from running import Running, benthic_server

from benthic.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Bench = Callable[..., tuple[int, str, str]]

FLAGS = ("--served-model-name", "nano", "--block-size", "16", "--disable-log-requests")
FEW = ("--num-prompts", "12", "--random-input-len", "20", "--random-output-len", "6", "--ignore-eos")
PATIENT = ("--max-client-lag", "100000")  # other tests share this machine


@pytest.fixture(scope="module")
def served(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with benthic_server(nano_checkpoint, log, *FLAGS) as running:
        yield running


@pytest.fixture
def bench(served: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command; gives its exit status and its two streams, each on one line."""

    def run(*flags: str) -> tuple[int, str, str]:
        words = ["benthic", "bench", "serve", "--base-url", served.url, *PATIENT, *flags]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, " ".join(out.split()), " ".join(err.split())

    return run


def test_a_sweep_against_our_own_server_counts_every_token(bench: Bench, tmp_path: Path) -> None:
    result, targets = tmp_path / "r.json", ("--goodput", "ttft:60000", "tpot:60000")
    rates = ("--backend", "vllm", "--request-rate", "40", "--request-rate", "80")
    code, out, err = bench(*FEW, *rates, *targets, "--result", str(result), "--plot", str(tmp_path / "p"))
    assert code == 0, out + err
    record = json.loads(result.read_text())
    assert [run["request_rate"] for run in record["runs"]] == [40.0, 80.0]
    for run in record["runs"]:
        assert (run["completed"], run["failed"], run["attainment"]) == (12, 0, 1.0)
        assert (run["total_input_tokens"], run["total_output_tokens"]) == (240, 72)
        assert run["token_counts"] == "every chunk"  # noqa: S105 (no password)
        assert 0 < run["median_ttft_ms"] < run["median_e2el_ms"]
    assert record["settings"]["model_id"] == record["server"]["model"] == "nano"
    assert (tmp_path / "p_goodput.svg").exists()


def test_a_closed_loop_of_chat_requests_works_with_a_tokenizer(bench: Bench, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick brown fox\njumps over the lazy dog\n")
    flags = ("--backend", "openai-chat", "--dataset-name", "custom", "--dataset-path", str(prompts))
    code, out, err = bench(*flags, "--num-prompts", "6", "--output-len", "4", "--max-concurrency", "2")
    assert code == 0, out + err
    assert "6 of 6 requests completed, 0 failed" in out


def test_targets_that_no_rate_meets_are_reported_as_such(bench: Bench) -> None:
    flags = ("--goodput", "ttft:0.001", "--find-goodput", "--request-rate", "64", "--num-prompts", "2")
    code, out, err = bench(*FEW[2:], *flags, "--num-warmups", "0")
    assert code == 0, out + err
    assert "No rate down to 1 requests/s" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "other"), "does not serve 'other', but nano"),
        (("--find-goodput",), "needs targets"),
        (("--goodput", "tpt:5"), "Did you mean 'tpot'"),
        (("--dataset-name", "azure"), "Give --dataset-path"),
        (("--metric-percentiles", "x"), "numbers from 0 to 100"),
        (("--extra-body", "[]"), "must be a JSON object"),
        (("--random-input-len", "400"), "a warm-up request failed: HTTP 400"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(
    bench: Bench, flags: tuple[str, ...], words: str
) -> None:
    code, _out, err = bench(*flags)
    assert code == 2
    assert words in err
