"""The flags of `benthic serve` as typer reads them: type, names, bounds, help, and where they are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benthic.cli import serve_words as words

ENGINE = "Engine"
CACHE = "KV cache"
REQUESTS = "Requests"
HTTP = "HTTP"
FLEET = "Prefill and decode instances"

Model = Annotated[
    Path | None, typer.Argument(help="Checkpoint folder: config.json, *.safetensors, tokenizer.json.")
]
ModelFlag = Annotated[Path | None, typer.Option("--model", help="The same as MODEL.")]
Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 picks one.", rich_help_panel=HTTP)]
ApiServerCount = Annotated[
    int,
    typer.Option(
        "--api-server-count",
        "-asc",
        min=1,
        help="Processes that answer HTTP; 1: the one that starts the engines.",
        rich_help_panel=HTTP,
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="Name that requests use (default: MODEL as given). Repeat for more.", rich_help_panel=HTTP
    ),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Require `Authorization: Bearer KEY`. Repeat for more; also BENTHIC_API_KEY.",
        rich_help_panel=HTTP,
    ),
]
MaxBodyBytes = Annotated[
    int, typer.Option(min=1024, help="Largest request body; larger ones get 413.", rich_help_panel=HTTP)
]
MaxRequestsPerMinute = Annotated[
    int | None,
    typer.Option(min=1, help="Of one API key, or one address; more get 429.", rich_help_panel=HTTP),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(min=0.001, help="Seconds from arrival to the end of an answer.", rich_help_panel=HTTP),
]
UvicornLogLevel = Annotated[words.LogLevel, typer.Option(help="How much uvicorn says.", rich_help_panel=HTTP)]
DisableUvicornAccessLog = Annotated[
    bool,
    typer.Option("--disable-uvicorn-access-log", help="No line per HTTP request.", rich_help_panel=HTTP),
]
ShutdownTimeout = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds that requests may go on after SIGTERM or Ctrl-C.", rich_help_panel=HTTP
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        min=1,
        help="Devices that hold a shard of the model each and compute every step together.",
        rich_help_panel=ENGINE,
    ),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        "--data-parallel-size",
        "-dp",
        min=1,
        help="Engines with requests of their own that divide the routed experts and step together.",
        rich_help_panel=ENGINE,
    ),
]
EnableExpertParallel = Annotated[
    bool,
    typer.Option(
        "--enable-expert-parallel",
        help="Each of these devices holds whole experts, not a part of every one.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt plus output (default: the model's).", rich_help_panel=ENGINE),
]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Most sequences in one step.", rich_help_panel=ENGINE)]
MaxNumBatchedTokens = Annotated[
    int,
    typer.Option(min=1, help="Most tokens in one step; longer prefills are chunked.", rich_help_panel=ENGINE),
]
Dtype = Annotated[
    words.Dtype,
    typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.", rich_help_panel=ENGINE),
]
LoadFormat = Annotated[
    words.LoadFormat,
    typer.Option(
        help="dummy: random weights; MODEL needs config.json and tokenizer.json alone.",
        rich_help_panel=ENGINE,
    ),
]
Quantization = Annotated[
    words.Quantization,
    typer.Option(
        "--quantization",
        "-q",
        help="auto: FP8 weights stay FP8 on a GPU; fp8: everywhere, others are quantised; none: widen.",
        rich_help_panel=ENGINE,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="No CUDA graphs, no CPU tapes.", rich_help_panel=ENGINE),
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="Scores do not depend on the batch.", rich_help_panel=ENGINE),
]
EnableDbo = Annotated[
    bool,
    typer.Option(
        "--enable-dbo",
        help="With --data-parallel-size: a step with prompts runs in two halves; one computes while the rows "
        "of the other travel.",
        rich_help_panel=ENGINE,
    ),
]
DboPrefillTokenThreshold = Annotated[
    int, typer.Option(help="Rows of a step from which on --enable-dbo does.", rich_help_panel=ENGINE)
]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Prepare a step while the one before runs (default: on a GPU).",
        rich_help_panel=ENGINE,
    ),
]
LatePlanningMs = Annotated[
    float | None,
    typer.Option(
        help="Plan a step so many ms before the one in flight should end, with whatever came until then; "
        "2 is usual (default: at once).",
        rich_help_panel=ENGINE,
    ),
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        help='JSON, as {"method": "mtp", "num_speculative_tokens": 2}; the method may be "ngram", too.',
        rich_help_panel=ENGINE,
    ),
]
CudagraphCaptureSizes = Annotated[
    list[int] | None,
    typer.Option(
        "--cudagraph-capture-sizes",
        "--cuda-graph-sizes",
        min=1,
        help="Batch size that gets a CUDA graph. Repeat for more (default: 1, 2, 4, 8, 16, 24, …).",
        rich_help_panel=ENGINE,
    ),
]
MaxCudagraphCaptureSize = Annotated[
    int,
    typer.Option(min=0, help="Largest batch that gets a CUDA graph; 0 for none.", rich_help_panel=ENGINE),
]
MaxPromptGraphSize = Annotated[
    int,
    typer.Option(
        min=0,
        help="Most rows of a step with prompts that gets a CUDA graph; 0 for none.",
        rich_help_panel=ENGINE,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.", rich_help_panel=ENGINE),
]
Seed = Annotated[int, typer.Option(help="Seed for requests that bring none.", rich_help_panel=ENGINE)]
NumThreads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of the engine.", rich_help_panel=ENGINE)
]
EngineStallTimeout = Annotated[
    float,
    typer.Option(
        min=1, help="Seconds of silence after which the engine is given up.", rich_help_panel=ENGINE
    ),
]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens in a cache block.", rich_help_panel=CACHE)]
KvCacheDtype = Annotated[
    words.CacheDtype,
    typer.Option(help="auto: as activations; fp8: E4M3, half the bytes.", rich_help_panel=CACHE),
]
NumGpuBlocksOverride = Annotated[
    int | None,
    typer.Option(
        "--num-gpu-blocks-override",
        "--num-blocks",
        min=1,
        help="Blocks in the cache, on any device.",
        rich_help_panel=CACHE,
    ),
]
KvCacheMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        min=1,
        help="Bytes of the cache.",
        rich_help_panel=CACHE,
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(help="Share of GPU memory for weights and cache, in (0, 1].", rich_help_panel=CACHE),
]
HostCacheGib = Annotated[
    float,
    typer.Option(
        "--host-cache-gib",
        "--kv-offloading-size",
        min=0,
        help="GiB of host memory, of an engine, for blocks evicted from the cache.",
        rich_help_panel=CACHE,
    ),
]
EnablePrefixCaching = Annotated[
    bool, typer.Option(help="Reuse blocks of equal prompt beginnings.", rich_help_panel=CACHE)
]
MaxWaiting = Annotated[
    int, typer.Option(min=0, help="Sequences that may wait; more get 503.", rich_help_panel=REQUESTS)
]
MaxLogprobs = Annotated[
    int,
    typer.Option(min=0, max=20, help="Most logprobs a request may ask for.", rich_help_panel=REQUESTS),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Jinja file (or text) instead of the checkpoint's template.", rich_help_panel=REQUESTS),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        help="Sampling defaults: auto (the model's generation_config.json), none, or a folder.",
        rich_help_panel=REQUESTS,
    ),
]
ToolCallParser = Annotated[
    words.ToolParser,
    typer.Option(help="auto reads the format off the chat template.", rich_help_panel=REQUESTS),
]
ReasoningParser = Annotated[
    words.ReasoningParser,
    typer.Option(help="auto looks for <think> in the chat template.", rich_help_panel=REQUESTS),
]
Prefill = Annotated[
    int, typer.Option(min=0, help="Instances that prefill for others.", rich_help_panel=FLEET)
]
Decode = Annotated[int, typer.Option(min=0, help="Instances that pull and decode.", rich_help_panel=FLEET)]
PrefillTensorParallelSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Ranks of an instance that prefills (default: --tensor-parallel-size).",
        rich_help_panel=FLEET,
    ),
]
DecodeTensorParallelSize = Annotated[
    int | None, typer.Option(min=1, help="The same of one that decodes.", rich_help_panel=FLEET)
]
PrefillPolicy = Annotated[
    str | None,
    typer.Option(help="prefix_affinity (the default) or shortest_queue.", rich_help_panel=FLEET),
]
LocalPrefillTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Prompts with at most so many new tokens skip the transfer; by default none do.",
        rich_help_panel=FLEET,
    ),
]
Replan = Annotated[
    float | None,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="Move instances to the kind that the load of so long needs more (default: never).",
        rich_help_panel=FLEET,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Place the instances on a Ray cluster: ray://HEAD:10001, auto or local.",
        rich_help_panel=FLEET,
    ),
]
KvHost = Annotated[
    str | None,
    typer.Option(help="Where other servers reach --kv-port; 127.0.0.1.", rich_help_panel=FLEET),
]
KvPort = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, help="Take part in transfers with other servers here.", rich_help_panel=FLEET
    ),
]
KvNixl = Annotated[
    bool, typer.Option("--kv-nixl", help="Move blocks between hosts by NIXL.", rich_help_panel=FLEET)
]
DisableLogRequests = Annotated[
    bool,
    typer.Option(
        "--disable-log-requests", help="No lines when requests start and end.", rich_help_panel=REQUESTS
    ),
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        help="Latency targets in ms that /metrics counts, as 'ttft:500 tpot:50'.",
        rich_help_panel=REQUESTS,
    ),
]
OtlpTracesEndpoint = Annotated[
    str | None,
    typer.Option(
        help="OpenTelemetry collector for traces, e.g. http://localhost:4318/v1/traces.",
        rich_help_panel=REQUESTS,
    ),
]
DisableLogStats = Annotated[
    bool,
    typer.Option(
        "--disable-log-stats", help="No throughput line every ten seconds.", rich_help_panel=REQUESTS
    ),
]
Record = Annotated[
    Path | None,
    typer.Option(
        help="Folder that gets every call to each scheduler with its time, as JSON lines: prompts, too.",
        rich_help_panel=REQUESTS,
    ),
]
WarmUpOnly = Annotated[
    bool,
    typer.Option(
        "--warm-up-only",
        help="Compile what these flags need, try it out, and end; `benthic warmup` sets it.",
        rich_help_panel=ENGINE,
    ),
]
