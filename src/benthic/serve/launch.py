"""What `benthic serve` checks before it starts anything, and what the engine process builds."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benthic.errors import ConfigError, NotACheckpointError, ServeError
from benthic.serve import followers
from benthic.serve.chat_template import ChatTemplate
from benthic.serve.sampling_defaults import SamplingDefaults
from benthic.serve.tools import AnswerFormats
from benthic.spec import hf
from benthic.spec.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benthic.serve.options import EngineOptions
    from benthic.serve.process import EngineLike
    from benthic.serve.tokenizer import Tokenizer
    from benthic.spec.model import ModelConfig

logger = logging.getLogger("benthic.serve.engine")


def load_engine(path: Path, options: EngineOptions) -> EngineLike:
    """Build the engine; runs in the engine process, the only one that loads torch."""
    if options.tensor_parallel_size > 1:
        followers.prepare()
    import torch  # noqa: PLC0415 (the HTTP process imports this module and must stay light)

    from benthic.serve.engine import Engine  # noqa: PLC0415

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device: %s (chosen by --device auto)", options.device)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        msg = f"device = {options.device}, but torch {torch.__version__} finds no GPU. Use --device cpu."
        raise ConfigError(msg)
    if options.tensor_parallel_size > 1:
        from benthic.serve.spread import SpreadEngine  # noqa: PLC0415 (only this engine needs other ranks)

        return SpreadEngine.from_pretrained(path, options)
    return Engine.from_pretrained(path, options)


def check_checkpoint(path: Path, *, weights: bool = True) -> ModelConfig:
    """Look before loading: a folder with a fitting `config.json` and, with `weights`, safetensors.

    Raises:
        NotACheckpointError: the folder, the config or the weights are not there.
        ConfigError: the config is not of this architecture or contradicts itself.
    """
    if not path.is_dir():
        msg = (
            f"{path} is not a folder. MODEL is a folder with config.json, *.safetensors and tokenizer.json; "
            "nothing is downloaded. `hf download NAME --local-dir FOLDER` fetches a model."
        )
        raise NotACheckpointError(msg)
    wanted = {"config.json": path / "config.json", "tokenizer.json": path / "tokenizer.json"}
    missing = [name for name, file in wanted.items() if not file.is_file()]
    if weights and not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        there = sorted(entry.name for entry in path.iterdir())[:8]
        msg = (
            f"{path} is not a checkpoint: it has no {' and no '.join(missing)} (there: "
            f"{', '.join(there) or 'nothing'}). {hf.nearest_checkpoint(path)}"
        )
        raise NotACheckpointError(msg)
    return hf.read(path / "config.json").config


def check_instances(  # noqa: PLR0913 (one flag each)
    options: EngineOptions,
    *,
    prefill: int,
    decode: int,
    prefill_policy: str | None = None,
    local_tokens: int | None = None,
    kv_host: str | None = None,
    kv_port: int | None,
    kv_nixl: bool = False,
    replan: float | None = None,
    cluster: str | None = None,
    prefill_ranks: int | None = None,
    decode_ranks: int | None = None,
) -> None:
    """Refuse ways of running that exclude each other.

    Raises:
        ConfigError: naming the flags.
    """
    both = "Give both"
    if not (prefill or decode):
        _refuse_without_fleet(
            {
                "replan": (
                    replan,
                    "moves instances between prefill and decode",
                    f"{both}, 3 together at least",
                ),
                "cluster": (cluster, "places the instances of a fleet", "Give --decode at least"),
                "prefill-tensor-parallel-size": (prefill_ranks, "is about instances that prefill", both),
                "decode-tensor-parallel-size": (decode_ranks, "is about instances that decode", both),
                "prefill-policy": (prefill_policy, "chooses among instances that prefill", both),
                "local-prefill-tokens": (local_tokens, "is about prompts that would move", both),
            }
        )
    elif kv_port is not None:
        msg = (
            f"--kv-port {kv_port} makes one engine part of others' fleets, but --prefill {prefill} and "
            f"--decode {decode} start a fleet of its own. Choose one."
        )
        raise ConfigError(msg)
    if options.data_parallel_size > 1 and (kv_port is not None or prefill or decode):
        alone = f"--kv-port {kv_port}" if kv_port is not None else f"--prefill {prefill} --decode {decode}"
        msg = (
            f"--data-parallel-size {options.data_parallel_size}, but {alone} takes engines that share "
            "nothing: those that share experts move no blocks. Leave out one or the other."
        )
        raise ConfigError(msg)
    ranks = max(options.tensor_parallel_size, prefill_ranks or 1, decode_ranks or 1)
    if cluster is not None and ranks > 1:
        msg = (
            f"--cluster {cluster} gives an instance 1 GPU, but it is to have {ranks} tensor-parallel ranks. "
            "Start servers with --kv-port on the nodes instead, or leave out the ranks."
        )
        raise ConfigError(msg)
    if kv_host is not None and kv_port is None:
        msg = f"--kv-host {kv_host} is where others reach --kv-port, which is not given. Give it too."
        raise ConfigError(msg)
    if kv_nixl and kv_port is None and not (prefill or decode):
        msg = (
            "--kv-nixl moves blocks between servers, but this one exchanges none. Give --kv-port, or "
            "--prefill and --decode, or leave it out."
        )
        raise ConfigError(msg)
    if kv_nixl and options.host_cache_gib:
        msg = (
            f"--host-cache-gib {options.host_cache_gib}, but --kv-nixl writes blocks without waiting for "
            "those that are on their way to the host. Leave out one or the other."
        )
        raise ConfigError(msg)


def _refuse_without_fleet(given: Mapping[str, tuple[object, str, str]]) -> None:
    """Raises: ConfigError for flags about the instances of a fleet where none are started.

    given: by flag its value, what it does, and what to do.
    """
    for flag, (value, what, remedy) in given.items():
        if value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            msg = f"--{flag} {shown} {what}, but --prefill 0 and --decode 0 start none. {remedy}."
            raise ConfigError(msg)


def check_division(options: EngineOptions, config: ModelConfig) -> None:
    """Raises: ConfigError when the model does not divide over the ranks, with both numbers."""
    own_tokens = options.data_parallel_size > 1
    Shard(size=options.ranks, whole_experts=options.enable_expert_parallel, own_tokens=own_tokens).check(
        config
    )


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded; it listens only when the server is ready. Port 0 picks one.

    Raises:
        ServeError: the port is in use, not permitted, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        msg = f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host."
        raise ServeError(msg) from error
    bound.setblocking(False)  # noqa: FBT003 (positional-only)
    return bound


def read_template(tokenizer: Tokenizer, given: str | None) -> ChatTemplate | None:
    """The chat template: of a file or as text where `given`, else the checkpoint's.

    Raises:
        ConfigError: neither a file nor Jinja text.
    """
    source = tokenizer.chat_template
    if given is not None:
        file = Path(given)
        if "{" not in given and not file.is_file():
            msg = f"--chat-template {given}: no such file, and no Jinja text either"
            raise ConfigError(msg)
        source = given if "{" in given else file.read_text(encoding="utf-8")
    return None if source is None else ChatTemplate(source, tokenizer.special_tokens)


def answer_formats(
    template: ChatTemplate | None,
    tools: Literal["auto", "none", "deepseek_v3", "deepseek_v31"],
    reasoning: Literal["auto", "none", "deepseek_r1"],
) -> AnswerFormats:
    """How the model writes tool calls and reasoning: as named, or ("auto") as its chat template shows."""
    formats = AnswerFormats.of_template(None if template is None else template.source)
    if tools != "auto":
        formats = replace(formats, tools=None if tools == "none" else tools)
    return formats if reasoning == "auto" else replace(formats, reasoning=reasoning != "none")


def read_sampling_defaults(model: Path, source: str) -> SamplingDefaults:
    """Defaults from `generation_config.json`: the model's ("auto"), nobody's ("none"), or another folder's.

    Raises:
        ConfigError: a folder without that file, or a file that cannot be read.
    """
    if source == "none":
        return SamplingDefaults()
    file = (model if source == "auto" else Path(source)) / "generation_config.json"
    if file.is_file():
        return SamplingDefaults.from_file(file)
    if source != "auto":
        msg = f"--generation-config {source}: {file} does not exist. Use auto, none or a folder that has it."
        raise ConfigError(msg)
    return SamplingDefaults()
