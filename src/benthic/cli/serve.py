"""`benthic serve`: an OpenAI-compatible server for a checkpoint folder."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import Annotated

import typer

from benthic.cli import serve_words as words
from benthic.cli.folders import user_cache

ENGINE = "Engine"
CACHE = "KV cache"
REQUESTS = "Requests"
HTTP = "HTTP"
FLEET = "Prefill and decode instances"


def serve(  # noqa: PLR0913 (one parameter a flag)
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder: config.json, *.safetensors, tokenizer.json.")
    ] = None,
    *,
    model_flag: Annotated[Path | None, typer.Option("--model", help="The same as MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks one.", rich_help_panel=HTTP)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that requests use (default: MODEL as given). Repeat for more.", rich_help_panel=HTTP
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Require `Authorization: Bearer KEY`. Repeat for more; also BENTHIC_API_KEY.",
            rich_help_panel=HTTP,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1024, help="Largest request body; larger ones get 413.", rich_help_panel=HTTP)
    ] = 16 << 20,
    max_requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Of one API key, or one address; more get 429.", rich_help_panel=HTTP),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds from arrival to the end of an answer.", rich_help_panel=HTTP),
    ] = None,
    uvicorn_log_level: Annotated[
        words.LogLevel, typer.Option(help="How much uvicorn says.", rich_help_panel=HTTP)
    ] = words.LogLevel.info,
    disable_uvicorn_access_log: Annotated[
        bool,
        typer.Option("--disable-uvicorn-access-log", help="No line per HTTP request.", rich_help_panel=HTTP),
    ] = False,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that requests may go on after SIGTERM or Ctrl-C.", rich_help_panel=HTTP
        ),
    ] = 30.0,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            min=1,
            help="Devices that hold a shard of the model each and compute every step together.",
            rich_help_panel=ENGINE,
        ),
    ] = 1,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel",
            help="Each of these devices holds whole experts, not a part of every one.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest prompt plus output (default: the model's).", rich_help_panel=ENGINE
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Most sequences in one step.", rich_help_panel=ENGINE)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Most tokens in one step; longer prefills are chunked.", rich_help_panel=ENGINE
        ),
    ] = 2048,
    dtype: Annotated[
        words.Dtype,
        typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.", rich_help_panel=ENGINE),
    ] = words.Dtype.auto,
    load_format: Annotated[
        words.LoadFormat,
        typer.Option(
            help="dummy: random weights; MODEL needs config.json and tokenizer.json alone.",
            rich_help_panel=ENGINE,
        ),
    ] = words.LoadFormat.auto,
    quantization: Annotated[
        words.Quantization,
        typer.Option(
            "--quantization",
            "-q",
            help="auto: FP8 weights stay FP8 on a GPU; fp8: everywhere, others are quantised; none: widen.",
            rich_help_panel=ENGINE,
        ),
    ] = words.Quantization.auto,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="No CUDA graphs, no CPU tapes.", rich_help_panel=ENGINE),
    ] = False,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="Scores do not depend on the batch.", rich_help_panel=ENGINE),
    ] = False,
    async_scheduling: Annotated[
        bool | None,
        typer.Option(
            "--async-scheduling/--no-async-scheduling",
            help="Prepare a step while the one before runs (default: on a GPU).",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(
            help='JSON, as {"method": "mtp", "num_speculative_tokens": 2}; or "ngram".',
            rich_help_panel=ENGINE,
        ),
    ] = None,
    cudagraph_capture_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--cudagraph-capture-sizes",
            "--cuda-graph-sizes",
            min=1,
            help="Batch size that gets a CUDA graph. Repeat for more (default: 1, 2, 4, 8, 16, 24, …).",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    max_cudagraph_capture_size: Annotated[
        int,
        typer.Option(min=0, help="Largest batch that gets a CUDA graph; 0 for none.", rich_help_panel=ENGINE),
    ] = 512,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.", rich_help_panel=ENGINE),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for requests that bring none.", rich_help_panel=ENGINE)] = 0,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the engine.", rich_help_panel=ENGINE)
    ] = None,
    engine_stall_timeout: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds of silence after which the engine is given up.", rich_help_panel=ENGINE
        ),
    ] = 300.0,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens in a cache block.", rich_help_panel=CACHE)
    ] = 64,
    kv_cache_dtype: Annotated[
        words.CacheDtype,
        typer.Option(help="auto: as activations; fp8: E4M3, half the bytes.", rich_help_panel=CACHE),
    ] = words.CacheDtype.auto,
    num_gpu_blocks_override: Annotated[
        int | None,
        typer.Option(
            "--num-gpu-blocks-override",
            "--num-blocks",
            min=1,
            help="Blocks in the cache, on any device.",
            rich_help_panel=CACHE,
        ),
    ] = None,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-memory",
            "--kv-cache-memory-bytes",
            min=1,
            help="Bytes of the cache.",
            rich_help_panel=CACHE,
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(help="Share of GPU memory for weights and cache, in (0, 1].", rich_help_panel=CACHE),
    ] = 0.9,
    host_cache_gib: Annotated[
        float,
        typer.Option(
            "--host-cache-gib",
            "--kv-offloading-size",
            min=0,
            help="GiB of host memory, of an engine, for blocks evicted from the cache.",
            rich_help_panel=CACHE,
        ),
    ] = 0.0,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse blocks of equal prompt beginnings.", rich_help_panel=CACHE)
    ] = True,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more get 503.", rich_help_panel=REQUESTS)
    ] = 1024,
    max_logprobs: Annotated[
        int,
        typer.Option(min=0, max=20, help="Most logprobs a request may ask for.", rich_help_panel=REQUESTS),
    ] = 20,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Jinja file (or text) instead of the checkpoint's template.", rich_help_panel=REQUESTS
        ),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Sampling defaults: auto (the model's generation_config.json), none, or a folder.",
            rich_help_panel=REQUESTS,
        ),
    ] = "auto",
    tool_call_parser: Annotated[
        words.ToolParser,
        typer.Option(help="auto reads the format off the chat template.", rich_help_panel=REQUESTS),
    ] = words.ToolParser.auto,
    reasoning_parser: Annotated[
        words.ReasoningParser,
        typer.Option(help="auto looks for <think> in the chat template.", rich_help_panel=REQUESTS),
    ] = words.ReasoningParser.auto,
    prefill: Annotated[
        int, typer.Option(min=0, help="Instances that prefill for others.", rich_help_panel=FLEET)
    ] = 0,
    decode: Annotated[
        int, typer.Option(min=0, help="Instances that pull and decode.", rich_help_panel=FLEET)
    ] = 0,
    prefill_policy: Annotated[
        str, typer.Option(help="prefix_affinity or shortest_queue.", rich_help_panel=FLEET)
    ] = "prefix_affinity",
    local_prefill_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Prompts with at most so many new tokens skip the transfer.", rich_help_panel=FLEET
        ),
    ] = 0,
    replan: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Move instances to the kind that the load of so long needs more (default: never).",
            rich_help_panel=FLEET,
        ),
    ] = None,
    kv_host: Annotated[
        str, typer.Option(help="Where other servers reach --kv-port.", rich_help_panel=FLEET)
    ] = "127.0.0.1",
    kv_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Take part in transfers with other servers here.", rich_help_panel=FLEET
        ),
    ] = None,
    kv_nixl: Annotated[
        bool, typer.Option("--kv-nixl", help="Move blocks between hosts by NIXL.", rich_help_panel=FLEET)
    ] = False,
    disable_log_requests: Annotated[
        bool,
        typer.Option(
            "--disable-log-requests", help="No lines when requests start and end.", rich_help_panel=REQUESTS
        ),
    ] = False,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="Latency targets in ms that /metrics counts, as 'ttft:500 tpot:50'.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenTelemetry collector for traces, e.g. http://localhost:4318/v1/traces.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    disable_log_stats: Annotated[
        bool,
        typer.Option(
            "--disable-log-stats", help="No throughput line every ten seconds.", rich_help_panel=REQUESTS
        ),
    ] = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API."""
    # imported here so that `benthic --help` needs neither FastAPI nor tokenizers
    from benthic.dash.page import DashPage  # noqa: PLC0415
    from benthic.serve import launch, server, speculative  # noqa: PLC0415
    from benthic.serve.fleet import Fleet, FleetOptions, load_instance  # noqa: PLC0415
    from benthic.serve.options import EngineOptions  # noqa: PLC0415
    from benthic.serve.service import ServiceSettings  # noqa: PLC0415
    from benthic.serve.tokenizer import Tokenizer  # noqa: PLC0415
    from benthic.spec.objectives import Objectives  # noqa: PLC0415
    from benthic.spec.shard import Shard  # noqa: PLC0415

    folder = words.one_model(model, model_flag)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    options = EngineOptions(
        device=device,
        dtype=dtype.value,
        load_format=load_format.value,
        quantization=quantization.value,
        kv_cache_dtype=kv_cache_dtype.value,
        tensor_parallel_size=tensor_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        enforce_eager=enforce_eager,
        async_scheduling=async_scheduling,
        batch_invariant=batch_invariant,
        cudagraph_capture_sizes=tuple(cudagraph_capture_sizes or ()),
        max_cudagraph_capture_size=max_cudagraph_capture_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=num_gpu_blocks_override,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        host_cache_gib=host_cache_gib,
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
        max_logprobs=max_logprobs,
        num_threads=num_threads,
        speculative=None if speculative_config is None else speculative.parse(speculative_config),
        native_folder=str(user_cache()),
    )
    http = server.ServerOptions(
        api_keys=words.api_keys(api_key),
        max_body_bytes=max_body_bytes,
        requests_per_minute=max_requests_per_minute,
        drain_s=shutdown_timeout,
        objectives=Objectives.parse(goodput or ()),
        report_s=0.0 if disable_log_stats else 10.0,
        stall_s=engine_stall_timeout,
        log_level=uvicorn_log_level.value,
        access_log=not disable_uvicorn_access_log,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    launch.check_instances(
        options, prefill=prefill, decode=decode, kv_port=kv_port, kv_nixl=kv_nixl, replan=replan
    )
    bound = launch.bind(host, port)
    config = launch.check_checkpoint(folder, weights=load_format is words.LoadFormat.auto)
    Shard(size=tensor_parallel_size, whole_experts=enable_expert_parallel).check(config)
    tokenizer = Tokenizer.from_folder(folder)
    template = launch.read_template(tokenizer, chat_template)
    parts = server.Parts(
        tokenizer=tokenizer,
        template=template,
        settings=ServiceSettings(
            served_names=tuple(served_model_name or [str(folder)]),
            root=str(folder),
            max_num_seqs=max_num_seqs * max(1, decode),
            max_waiting=max_waiting,
            defaults=launch.read_sampling_defaults(folder, generation_config),
            request_timeout_s=request_timeout,
            formats=launch.answer_formats(template, tool_call_parser.value, reasoning_parser.value),
            log_requests=not disable_log_requests,
            kv_transfer=kv_port is not None,
        ),
        options=http,
        wall=time.time,
        page=DashPage,
    )
    if kv_port is not None:
        build = functools.partial(
            load_instance, folder, options, f"tcp://{kv_host}:{kv_port}", 0, nixl=kv_nixl
        )
        raise typer.Exit(server.run(build, bound, parts))
    if not prefill and not decode:
        raise typer.Exit(server.run(functools.partial(launch.load_engine, folder, options), bound, parts))
    spread = FleetOptions(
        prefill=prefill, decode=decode, prefill_policy=prefill_policy, local_tokens=local_prefill_tokens,
        replan_s=replan,
    )  # fmt: skip
    fleet = Fleet(checkpoint=folder, engine=options, options=spread)
    raise typer.Exit(server.run(fleet, bound, parts))
