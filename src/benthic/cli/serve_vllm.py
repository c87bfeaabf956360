"""Words of `vllm serve` on our command line: its spellings, flags that change nothing here, and remedies.

What is accepted without effect is said on standard error; what would have had one is refused with what to do
instead.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand, TyperOption

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SO_ANYWAY: Final = frozenset(
    {
        "--enable-auto-tool-choice",
        "--enable-chunked-prefill",
        "--enable-log-requests",
        "--enable-prompt-tokens-details",
        "--enable-reasoning",
        "--enable-request-id-headers",
        "--exclude-tools-when-tool-choice-none",
        "--language-model-only",
        "--no-trust-remote-code",
        "--trust-remote-code",
    }
)
"""Flags without a value that ask for what is so anyway (code of a checkpoint is never run)."""

ONLY: Final[dict[str, tuple[str, ...]]] = {
    "--chat-template-content-format": ("auto", "string"),
    "--config-format": ("auto", "hf"),
    "--data-parallel-backend": ("mp",),
    "--distributed-executor-backend": ("mp",),
    "--guided-decoding-backend": ("auto", "guidance"),
    "--logprobs-mode": ("raw_logprobs",),
    "--model-impl": ("auto",),
    "--nnodes": ("1",),
    "--pipeline-parallel-size": ("1",),
    "--preemption-mode": ("recompute",),
    "--response-role": ("assistant",),
    "--runner": ("auto", "generate"),
    "--scheduling-policy": ("fcfs", "priority"),
    "--stream-interval": ("1",),
    "--task": ("auto", "generate"),
    "--tokenizer-mode": ("auto", "hf"),
}
"""Flags whose value can only be what is so anyway."""

SAME: Final = {"--no-enable-log-requests": "--disable-log-requests", "-pp": "--pipeline-parallel-size"}

VALUES: Final[dict[str, dict[str, str]]] = {
    "--dtype": {"half": "float16", "float": "float32"},
    "--generation-config": {"vllm": "none"},
    "--load-format": {"safetensors": "auto"},
    "--reasoning-parser": {"deepseek_v3": "deepseek_r1"},
}
"""Other words for the same."""

_PROXY = "That belongs in a reverse proxy before the server."
_FOLDER = "MODEL is a folder on this host: `hf download` with what you want, and name the folder."
_CONFIG = "Edit config.json in MODEL."
_CHOSEN = "It is chosen by model and GPU. Leave it out."
_TEXT = "The architecture reads text alone. Leave it out."
_NO_LORA = "Merge the adapter into the weights."
_SPECULATE = 'Use --speculative-config \'{"method": "mtp", "num_speculative_tokens": 2}\'.'
_ONE_HOST = "Engines that share experts are on one host. Start one server a host, or use --cluster."
_GRAPHS = "Use --cudagraph-capture-sizes, --max-cudagraph-capture-size or --enforce-eager."
_METRICS = "Read /metrics, or use --otlp-traces-endpoint."
_CHUNKS = "Use --max-num-batched-tokens."

REMEDIES: Final = {
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs"), _PROXY),
    **dict.fromkeys(("--allowed-origins", "--allowed-methods", "--allowed-headers"), _PROXY),
    **dict.fromkeys(("--allow-credentials", "--root-path", "--middleware", "--disable-fastapi-docs"), _PROXY),
    **dict.fromkeys(("--revision", "--tokenizer-revision", "--code-revision", "--download-dir"), _FOLDER),
    **dict.fromkeys(("--hf-overrides", "--rope-scaling", "--rope-theta", "--hf-config-path"), _CONFIG),
    **dict.fromkeys(("--attention-backend", "--all2all-backend", "--disable-custom-all-reduce"), _CHOSEN),
    **dict.fromkeys(("--limit-mm-per-prompt", "--mm-processor-kwargs", "--media-io-kwargs"), _TEXT),
    **dict.fromkeys(("--enable-lora", "--lora-modules", "--max-lora-rank", "--max-loras"), _NO_LORA),
    **dict.fromkeys(("--speculative-model", "--num-speculative-tokens", "--spec-method"), _SPECULATE),
    **dict.fromkeys(("--headless", "--node-rank", "--master-addr", "--data-parallel-size-local"), _ONE_HOST),
    **dict.fromkeys(("--data-parallel-address", "--data-parallel-rpc-port"), _ONE_HOST),
    **dict.fromkeys(("--compilation-config", "-O", "-cc", "--max-seq-len-to-capture"), _GRAPHS),
    **dict.fromkeys(("--enable-server-load-tracking", "--collect-detailed-traces"), _METRICS),
    **dict.fromkeys(("--max-num-partial-prefills", "--long-prefill-token-threshold"), _CHUNKS),
    "--no-enable-chunked-prefill": "Prefills are always chunked. Raise --max-num-batched-tokens.",
    "--config": "Write the flags on the command line.",
    "--tokenizer": "Put tokenizer.json into MODEL.",
    "--skip-tokenizer-init": "Send token ids as prompt; the server keeps its tokenizer.",
    "--override-generation-config": "Use --generation-config with a folder that has generation_config.json.",
    "--default-chat-template-kwargs": "Send chat_template_kwargs with each request.",
    "--swap-space": "Preempted sequences are computed again. Use --kv-offloading-size for cached prefixes.",
    "--kv-offloading-backend": "Use --kv-offloading-size alone.",
    "--cpu-offload-gb": "Weights stay on the GPU. Use --tensor-parallel-size or --quantization fp8.",
    "--calculate-kv-scales": "FP8 latents are stored unscaled. Leave it out.",
    "--kv-transfer-config": "Use --kv-port and --kv-host, or --prefill and --decode on one host.",
    "--kv-events-config": "Use --prefill-policy prefix_affinity, or a router that needs no events.",
    "--enable-eplb": "Experts stay where they are placed. Leave it out.",
    "--dbo-decode-token-threshold": "Graphs of decodes stay whole. Use --dbo-prefill-token-threshold.",
    "--structured-outputs-config": "llguidance follows every grammar. Leave it out.",
    "--tool-parser-plugin": "Formats are built in: see --tool-call-parser.",
    "--return-tokens-as-token-ids": "Send return_tokens_as_token_ids with each request.",
    "--max-log-len": "Prompts are never logged. Leave it out.",
    "--disable-frontend-multiprocessing": "The engine has a process of its own. Leave it out.",
    "--enable-sleep-mode": "Stop the server; a start takes as long as reading the weights.",
    "--uds": "Use --host and --port.",
}  # fmt: skip
"""Why a flag is not here, or what to do instead."""

NUMBERS: Final = frozenset(
    {
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        "--max-model-len",
        "--max-num-batched-tokens",
        "--max-num-seqs",
    }
)
"""Flags whose numbers may be written 8k (thousands) or 8K (times 1,024)."""


class ServeCommand(TyperCommand):
    """`benthic serve`, which understands the words of `vllm serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, in our own words."""
        return super().parse_args(ctx, translate(args, self.params))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """In plain lines: the usual table cuts the names of a third of these flags at 80 columns."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Under the names of their panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            plain = "Arguments" if each.param_type_name == "argument" else "Options"
            record = each.get_help_record(ctx)
            if record is not None:
                panels.setdefault(getattr(each, "rich_help_panel", None) or plain, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


def translate(words: Sequence[str], parameters: Iterable[Any]) -> list[str]:
    """A command line in our own words.

    Args:
        words: what was typed behind `serve`.
        parameters: of the command, as click has them.

    Raises:
        ConfigError: a flag of vLLM's would change something that cannot be changed here.
    """
    options = [each for each in parameters if isinstance(each, TyperOption) and not each.is_flag]
    lists = {name: each.multiple for each in options for name in each.opts}
    left, ours = deque(words), list[str]()
    model, spare = False, None
    while left:
        flag, equals, value = spelled(left.popleft())
        if not flag.startswith("-"):
            model = True
            ours.append(flag)
        elif flag in REMEDIES:
            msg = f"{flag} is a flag of vLLM's. {REMEDIES[flag]}"
            raise ConfigError(msg)
        elif flag in SO_ANYWAY:
            typer.echo(f"note: {flag} changes nothing here", err=True)
        elif flag in ONLY:
            _check(flag, value if equals else _next(left))
        elif flag in lists and (equals or left):
            model = model or flag == "--model"
            ours += [flag, _value(flag, value if equals else left.popleft())]
            while lists[flag] and not equals and left and not left[0].startswith("-"):
                spare = len(ours)
                ours += [flag, left.popleft()]
        else:
            ours.append(f"{flag}{equals}{value}")
    if spare is not None and not model:  # the last word behind a list of them is MODEL
        del ours[spare]
    return ours


def spelled(word: str) -> tuple[str, str, str]:
    """A flag with hyphens, "=" and value where they are one word; any other word as it is."""
    if not word.startswith("-"):
        return word, "", ""
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    return SAME.get(flag, flag), equals, value


def _next(left: deque[str]) -> str:
    return left.popleft() if left and not left[0].startswith("-") else ""


def _check(flag: str, value: str) -> None:
    """Say that a flag changes nothing. Raises: ConfigError when it would."""
    if value not in ONLY[flag]:
        msg = f"{flag} {value}: here it can only be {' or '.join(ONLY[flag])}. Leave it out."
        raise ConfigError(msg)
    typer.echo(f"note: {flag} {value} changes nothing here", err=True)


def _value(flag: str, value: str) -> str:
    """A value as our own flags take it."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", value) if flag in NUMBERS else None
    if number is None:
        return VALUES.get(flag, {}).get(value, value)
    unit = number[2]
    power = "kmgt".index(unit.lower()) + 1
    return f"{float(number[1]) * (1000 if unit.islower() else 1024) ** power:.0f}"
