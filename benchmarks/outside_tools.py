"""Programs of others, unmodified, against `benthic serve` on a CPU: what each did with it.

    python benchmarks/outside_tools.py --vllm-router PATH --lm-eval PATH --guidellm PATH --aiperf PATH

Every PATH is the program in an environment of its own (`pip install vllm-router`, `'lm-eval[api]'`,
`guidellm`, `aiperf`); a program without one is recorded as not run. The model is `nano` with random weights,
its tokenizer has a token for every byte. vllm-router stands before two servers with `--kv-port`: it prefills
in one and decodes in the other, and the answers must be those of a single server. (schemathesis and the
`openai` client run in the test suite.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import write_result
from random_checkpoint import NAME, QUIET
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benthic.bench.served import Server, free_port, serving
from benthic.model.checkpoint import save_pretrained
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.spec import presets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOOLS = ("vllm-router", "lm-eval", "guidellm", "aiperf")
ENGINE = ("--served-model-name", NAME, *QUIET, "--num-threads", "1", "--block-size", "16")
TIMEOUT_S = 240
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TASK = """task: bytes
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@dataclass(frozen=True)
class Setting:
    """Where everything is: a folder to write in, the checkpoint, and one server."""

    folder: Path
    checkpoint: Path
    server: Server


def main() -> None:
    """Run the programs that were named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for tool in TOOLS:
        parser.add_argument(f"--{tool}", metavar="PATH")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    paths = {tool: getattr(words, tool.replace("-", "_")) for tool in TOOLS}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = make_checkpoint(folder / "nano")
        with serving([str(checkpoint), *ENGINE], folder / "server.log") as server:
            setting = Setting(folder, checkpoint, server)
            for tool, path in paths.items():
                rows.append(row_of(tool, path, setting))
                print(json.dumps(rows[-1], indent=1), flush=True)
    sys.argv[1:] = []  # where the programs lie says nothing
    print(write_result("outside_tools", rows, out=words.out))


def make_checkpoint(folder: Path) -> Path:
    """`nano` with random weights, a tokenizer with one token for every byte, and a chat template."""
    config = replace(presets.get("nano"), initializer_range=0.15, max_position_embeddings=1024)
    model = DeepSeek(config)
    initialise(model, 0)
    save_pretrained(model, folder)
    letters = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def row_of(tool: str, path: str | None, setting: Setting) -> dict[str, Any]:
    """What became of one program."""
    run: dict[str, Callable[[str, Setting], dict[str, Any]]] = {
        "vllm-router": vllm_router,
        "lm-eval": lm_eval,
        "guidellm": guidellm,
        "aiperf": aiperf,
    }
    if path is None:
        return {"tool": tool, "ran": False}
    began = time.monotonic()
    row = run[tool](path, setting)
    return {"tool": tool, "version": version(path, tool), "ran": True, **row} | {
        "seconds": round(time.monotonic() - began, 1)
    }


def version(path: str, tool: str) -> str:
    """The version of the package in the program's environment."""
    code = f"import importlib.metadata as m; print(m.version({tool!r}))"
    python = Path(path).parent / "python"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def carried_out(words: list[str], setting: Setting) -> dict[str, Any]:
    """Run a program to its end: its command, status, the end of what it printed, and what the server saw."""
    before = requests_seen(setting.server)
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=setting.folder
        )
        status, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, printed = -1, f"not over within {TIMEOUT_S} s: {error.stdout or b''!r}"
    seen = requests_seen(setting.server) - before
    hidden = shlex.join([Path(words[0]).name, *words[1:]]).replace(str(setting.folder), "FOLDER")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed).replace(str(setting.folder), "FOLDER")
    lines = [re.sub(r"(/[\w.+-]+){3,}", "PATH", line.rstrip()) for line in plain.splitlines()]
    lines = [line for line in lines if line.strip() and "%|" not in line]  # without progress bars
    return {
        "command": hidden,
        "status": status,
        "requests_that_ended_well": seen,
        "end_of_output": lines[-16:],
    }


def requests_seen(server: Server) -> int:
    """Requests that the server has finished, by its own metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:  # noqa: S310 (our own)
        text = answer.read().decode()
    return int(sum(float(n) for n in re.findall(r"^\w+:request_success_total\{.*?\} (\S+)", text, re.M)))


def lm_eval(path: str, setting: Setting) -> dict[str, Any]:
    """`local-completions` on a multiple choice of our own (log-likelihoods by echo and logprobs)."""
    tasks = setting.folder / "tasks"
    tasks.mkdir()
    data = tasks / "bytes.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is {n} a number?"}) + "\n" for n in range(12)))
    (tasks / "bytes.yaml").write_text(TASK.replace("DATA", str(data)))
    model = f"model={NAME},base_url={setting.server.url}/v1/completions,tokenizer={setting.checkpoint}"
    words = ["--model", "local-completions", "--model_args", f"{model},num_concurrent=4,max_length=512"]
    return carried_out([path, "run", *words, "--include_path", str(tasks), "--tasks", "bytes"], setting)


def guidellm(path: str, setting: Setting) -> dict[str, Any]:
    """Synthetic prompts, two at a time."""
    words = ["run", "--backend", f"kind=openai_http,target={setting.server.url},model={NAME}"]
    words += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=12"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={setting.checkpoint}"]
    words += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16", "--disable-progress"]
    return carried_out([path, *words], setting)


def aiperf(path: str, setting: Setting) -> dict[str, Any]:
    """Streamed chats, two at a time."""
    words = [
        "profile",
        "--model",
        NAME,
        "--url",
        setting.server.url,
        "--endpoint-type",
        "chat",
        "--streaming",
    ]
    words += ["--tokenizer", str(setting.checkpoint), "--concurrency", "2", "--request-count", "12"]
    words += ["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16", "--ui", "none"]
    return carried_out([path, *words], setting)


def vllm_router(path: str, setting: Setting) -> dict[str, Any]:
    """Completions and chats, whole and streamed, through prefill and decode servers, beside one server's."""
    with contextlib.ExitStack() as stack:
        pair = [
            stack.enter_context(
                serving(
                    [str(setting.checkpoint), *ENGINE, "--kv-port", str(free_port())],
                    setting.folder / f"{name}.log",
                )
            )
            for name in ("prefill", "decode")
        ]
        words = ["--vllm-pd-disaggregation", "--prefill", pair[0].url, "--decode", pair[1].url]
        router = stack.enter_context(routing(path, words, setting.folder / "router.log"))
        bodies = list(questions())
        direct = [answer(setting.server.url, where, body) for where, body in bodies]
        routed = [answer(router, where, body) for where, body in bodies]
        seen = [requests_seen(server) for server in pair]
    same = sum(a == b for a, b in zip(direct, routed, strict=True))
    return {
        "command": "vllm-router --vllm-pd-disaggregation --prefill URL --decode URL",
        "requests": len(bodies),
        "answers_equal_to_one_server": same,
        "requests_that_ended_well": {"prefill": seen[0], "decode": seen[1]},
        "first_difference": next(((a, b) for a, b in zip(direct, routed, strict=True) if a != b), None),
    }


@contextlib.contextmanager
def routing(path: str, words: list[str], log: Path) -> Iterator[str]:
    """The router's address, for the length of the block. Raises: RuntimeError when it does not come up."""
    port, metrics = free_port(), free_port()
    ports = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    with log.open("wb") as printed:
        process = subprocess.Popen([path, *ports, *words], stdout=printed, stderr=printed)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                break
            if process.poll() is not None or time.monotonic() > deadline:
                message = f"vllm-router is not up:\n{log.read_text(errors='replace')[-3000:]}"
                raise RuntimeError(message)
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def questions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies of requests with a seed, so that they have one answer."""
    for n in range(12):
        body: dict[str, Any] = {"model": NAME, "max_tokens": 12, "seed": n, "temperature": n % 3 / 2}
        body |= {"ignore_eos": True, "stream": n % 2 == 1}
        text = f"{n} bottles of beer on the wall, " * (1 + n % 4)
        if n % 4 < 2:
            yield "/v1/completions", body | {"prompt": text}
        else:
            yield "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def answer(url: str, where: str, body: dict[str, Any]) -> str:
    """The text of an answer, or what went wrong."""
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{url}{where}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            lines = reply.read().decode().splitlines()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    if not body["stream"]:
        lines = [f"data: {' '.join(lines)}"]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(text_of(chunk["choices"][0]) for chunk in chunks if chunk.get("choices"))


def text_of(choice: dict[str, Any]) -> str:
    """The text of a whole or streamed choice of either API."""
    message = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or message.get("content") or ""


if __name__ == "__main__":
    main()
