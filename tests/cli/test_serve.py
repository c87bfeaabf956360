from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from benthic.cli import serve_vllm
from benthic.cli.main import app, main
from benthic.cli.serve_words import traces_endpoint
from benthic.serve.protocol_requests import UNSUPPORTED, ChatBody, CompletionBody

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "serving.md").read_text()


Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must be refused; gives the error on one line, as terminals wrap it."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benthic", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like a checkpoint; the weights are never read."""
    from benthic.spec import hf, presets

    (tmp_path / "config.json").write_text(hf.dumps(presets.get("nano")))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_wrong_flag_is_answered_with_the_nearest_one(fails: Fails) -> None:
    assert "--max-model-len" in fails("serve", "model", "--max-model-length", "5")
    assert "--url" in fails("chat", "--ulr", "x")


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path, fails: Fails
) -> None:
    assert "is not a folder" in fails("serve", str(tmp_path / "nowhere"), "--port", "0")
    assert "hf download NAME" in fails("serve", "deepseek-ai/DeepSeek-V3", "--port", "0")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json and no tokenizer.json and no *.safetensors (there: nothing)" in fails(
        "serve", str(empty), "--port", "0"
    )
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in fails("serve", str(folder), "--port", "0")


def test_a_folder_of_a_training_run_is_answered_with_what_can_be_served(
    folder: Path, tmp_path: Path, fails: Fails
) -> None:
    run = tmp_path / "run"
    step = run / "checkpoint" / "step-5"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    assert "Point to a folder in the Hugging Face format" in fails("serve", str(run / "checkpoint"))
    assert f"`benthic convert {step} FOLDER`" in fails("serve", str(run), "--port", "0")
    assert f"`benthic convert {step} FOLDER`" in fails("serve", str(step), "--port", "0")
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    assert f"The run's model is in {run / 'hf'}." in fails("serve", str(run), "--port", "0")


def test_a_config_that_contradicts_itself_or_a_broken_tokenizer_names_the_fault(
    folder: Path, fails: Fails
) -> None:
    assert "tokenizer.json cannot be read as a tokenizer" in fails("serve", str(folder), "--port", "0")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 3}))
    assert "n_group" in fails("serve", str(folder), "--port", "0")


def test_a_model_that_does_not_divide_is_refused_before_anything_starts(folder: Path, fails: Fails) -> None:
    error = fails("serve", str(folder), "--port", "0", "--tensor-parallel-size", "3")
    assert "num_attention_heads = 4 does not divide over tensor_parallel_size = 3" in error
    error = fails("serve", str(folder), "--port", "0", "-tp", "16", "--enable-expert-parallel")
    assert "n_routed_experts = 8 does not divide over tensor_parallel_size = 16" in error
    error = fails("serve", str(folder), "--port", "0", "-dp", "3", "--enable-expert-parallel")
    assert "n_routed_experts = 8 does not divide over data_parallel_size = 3" in error


def test_a_port_in_use_is_an_error_before_the_model_is_looked_at(fails: Fails) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails("serve", "/no/such/model", "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "Choose another --port" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "no model given"),
        (("a", "--model", "b"), "MODEL = a but --model = b"),
        (("a", "--gpu-memory-utilization", "1.5"), "gpu_memory_utilization = 1.5"),
        (("a", "--num-blocks", "4", "--kv-cache-memory", "100"), "both size the cache"),
        (("a", "--api-key", " "), "--api-key is empty"),
        (("a", "--block-size", "0"), "--block-size"),
        (("a", "--device", "gpu"), "device = 'gpu'"),
        (("a", "--swap_space", "4"), "--swap-space is a flag of vLLM's. Preempted sequences are computed"),
        (("a", "--ssl-keyfile=key.pem"), "in a reverse proxy"),
        (("a", "-pp", "2"), "--pipeline-parallel-size 2: here it can only be 1"),
        (("a", "--tokenizer-mode"), "--tokenizer-mode : here it can only be auto or hf"),
        (("a", "--dtype", "int3"), "int3"),
        (("a", "--port", "70000"), "--port"),
        (("a", "--api-server-count", "0"), "--api-server-count"),
        (("a", "--api-server-count", "auto"), "parse string as an integer"),
        (("a", "--tensor-parallel-size", "0"), "--tensor-parallel-size"),
        (
            ("a", "--batch-invariant", "-tp", "2"),
            "batch_invariant = True needs tensor_parallel_size = 1, not 2",
        ),
        (("a", "--kv-port", "5000", "--decode", "2"), "--kv-port 5000"),
        (
            ("a", "-tp", "2", "--prefill", "1", "--decode", "1", "--cluster", "auto"),
            "gives an instance 1 GPU, but it is to have 2",
        ),
        (("a", "--decode-tensor-parallel-size", "2"), "--decode-tensor-parallel-size 2 is about instances"),
        (
            ("a", "--prefill", "2", "--decode", "1", "--replan", "9", "--prefill-tensor-parallel-size", "2"),
            "have 2 and 1 tensor-parallel ranks",
        ),
        (("a", "-dp", "2"), "data_parallel_size = 2 divides whole experts"),
        (("a", "-dp", "2", "-tp", "2", "--enable-expert-parallel"), "tensor_parallel_size = 2"),
        (("a", "-dp", "2", "--enable-expert-parallel", "--decode", "2"), "--prefill 0 --decode 2 takes"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: tuple[str, ...], words: str, fails: Fails) -> None:
    assert words in fails("serve", *flags)


def test_words_of_vllm_mean_what_they_mean_there() -> None:
    parameters = typer.main.get_command(app).commands["serve"].params

    def ours(line: str) -> str:
        return " ".join(serve_vllm.translate(line.split(), parameters))

    assert ours("m --max_model_len=8k --max-num-seqs 1K --trust-remote-code") == (
        "m --max-model-len 8000 --max-num-seqs 1024"
    )
    assert ours("m --dtype half --generation-config vllm --task generate --enforce_eager") == (
        "m --dtype float16 --generation-config none --enforce-eager"
    )
    assert ours("m --served-model-name a b_c --cuda-graph-sizes 1 2 -tp 2") == (
        "m --served-model-name a --served-model-name b_c --cuda-graph-sizes 1 --cuda-graph-sizes 2 -tp 2"
    )
    assert ours("--port 80 --served-model-name a b m") == (
        "--port 80 --served-model-name a --served-model-name b m"
    )
    assert ours("--model m --api-key -x --api-key=y --seed -1 --no-enable-log-requests") == (
        "--model m --api-key -x --api-key y --seed -1 --disable-log-requests"
    )
    assert ours("m --goodput ttft:5 tpot:6 --unknown_flag=a_b --port") == (
        "m --goodput ttft:5 --goodput tpot:6 --unknown-flag=a_b --port"
    )


def test_no_flag_is_both_ours_and_vllms_and_the_guide_names_what_changes_nothing() -> None:
    command = typer.main.get_command(app).commands["serve"]
    flags = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert not flags & (serve_vllm.REMEDIES.keys() | serve_vllm.ONLY.keys() | serve_vllm.SO_ANYWAY)
    assert {*serve_vllm.NUMBERS, *serve_vllm.VALUES, "--disable-log-requests"} <= flags
    section = PAGE[PAGE.index("## Coming from vLLM") :]
    assert {*serve_vllm.SO_ANYWAY, *serve_vllm.ONLY} <= set(re.findall(r"`(--[\w-]+)", section))


def test_templates_and_generation_configs_that_do_not_exist_are_refused(
    folder: Path, tmp_path: Path, fails: Fails
) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    serve = ("serve", str(folder), "--port", "0")
    assert "no such file" in fails(*serve, "--chat-template", "missing.jinja")
    assert "not valid Jinja (line 1)" in fails(*serve, "--chat-template", "{% if %}")
    assert "does not exist" in fails(*serve, "--generation-config", str(tmp_path / "other"))
    for value, bound in (("9", "less than or equal to 2 (got 9)"), ("true", "number"), ('"hot"', "number")):
        (folder / "generation_config.json").write_text(f'{{"temperature": {value}}}')
        error = fails(*serve)
        assert f"{folder / 'generation_config.json'}: temperature: " in error
        assert bound in error


@pytest.mark.parametrize("endpoint", ["foo", "localhost:4318", "grpc://localhost:4317", "http://"])
def test_a_collector_that_is_no_url_of_http_is_refused_at_the_start(fails: Fails, endpoint: str) -> None:
    error = fails("serve", "model", "--otlp-traces-endpoint", endpoint)
    assert f"--otlp-traces-endpoint {endpoint} is no URL" in error
    assert "http://localhost:4318/v1/traces" in error
    assert traces_endpoint("https://collector/v1/traces") == "https://collector/v1/traces"


def test_chat_without_a_server_says_how_to_start_one(fails: Fails) -> None:
    assert "benthic serve MODEL" in fails("chat", "--url", "http://127.0.0.1:1")
    assert "Give one of them" in fails("chat", "model", "--url", "http://127.0.0.1:1")


def test_the_exit_status_and_the_message_reach_the_shell() -> None:
    command = [sys.executable, "-c", "from benthic.cli.main import main; main()", "serve", "/no/such/model"]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "/no/such/model is not a folder" in done.stderr


def test_help_names_every_flag_of_serve_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["serve", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").replace("/", " ").split())
    command = typer.main.get_command(app).commands["serve"]
    flags = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert flags <= words


def test_help_needs_no_server_libraries() -> None:
    code = (
        "import sys; from benthic.cli.main import app\n"
        "print([m for m in ('torch', 'fastapi', 'zmq', 'tokenizers', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_http_process_never_loads_torch() -> None:
    code = (
        "import sys, benthic.serve.server, benthic.serve.launch, benthic.serve.client\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_guide_names_every_flag_and_every_request_field() -> None:
    command = typer.main.get_command(app).commands["serve"]
    flags = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    listed = set(re.findall(r"`(--[\w-]+)`", PAGE[PAGE.index("## Flags") : PAGE.index("## Metrics")]))
    assert listed == {flag for flag in flags if flag.startswith("--")}
    words = set(re.findall(r"`(\w+)`", PAGE[PAGE.index("### Request fields") : PAGE.index("### Errors")]))
    fields = set(CompletionBody.model_fields) | set(ChatBody.model_fields)
    assert fields <= words
    assert not fields & set(UNSUPPORTED)


def test_warmup_takes_the_words_of_serve_and_serves_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benthic.serve import server

    asked = []
    monkeypatch.setattr(server, "run_warm_up", lambda engines, options: asked.append(engines) or 0)
    words = ["benthic", "warmup", str(folder), "--max-model-len", "64", "--load-format", "dummy"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    path, options = asked[0].args
    assert (path, options.max_model_len) == (folder, 64)
