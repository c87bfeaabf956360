"""`benthic serve`: an OpenAI-compatible server for a checkpoint folder."""

from __future__ import annotations

import functools
import logging
import time

import typer

from benthic.cli import serve_flags as flags
from benthic.cli import serve_words as words
from benthic.cli.folders import user_cache


def serve(  # noqa: PLR0913 (one flag each)
    model: flags.Model = None,
    *,
    model_flag: flags.ModelFlag = None,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    api_server_count: flags.ApiServerCount = 1,
    served_model_name: flags.ServedModelName = None,
    api_key: flags.ApiKey = None,
    max_body_bytes: flags.MaxBodyBytes = 16 << 20,
    max_requests_per_minute: flags.MaxRequestsPerMinute = None,
    request_timeout: flags.RequestTimeout = None,
    uvicorn_log_level: flags.UvicornLogLevel = words.LogLevel.info,
    disable_uvicorn_access_log: flags.DisableUvicornAccessLog = False,
    shutdown_timeout: flags.ShutdownTimeout = 30.0,
    tensor_parallel_size: flags.TensorParallelSize = 1,
    data_parallel_size: flags.DataParallelSize = 1,
    enable_expert_parallel: flags.EnableExpertParallel = False,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = 256,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = 2048,
    dtype: flags.Dtype = words.Dtype.auto,
    load_format: flags.LoadFormat = words.LoadFormat.auto,
    quantization: flags.Quantization = words.Quantization.auto,
    enforce_eager: flags.EnforceEager = False,
    batch_invariant: flags.BatchInvariant = False,
    enable_dbo: flags.EnableDbo = False,
    dbo_prefill_token_threshold: flags.DboPrefillTokenThreshold = 512,
    async_scheduling: flags.AsyncScheduling = None,
    late_planning_ms: flags.LatePlanningMs = None,
    speculative_config: flags.SpeculativeConfig = None,
    cudagraph_capture_sizes: flags.CudagraphCaptureSizes = None,
    max_cudagraph_capture_size: flags.MaxCudagraphCaptureSize = 512,
    max_prompt_graph_size: flags.MaxPromptGraphSize = 4096,
    device: flags.Device = "auto",
    seed: flags.Seed = 0,
    num_threads: flags.NumThreads = None,
    engine_stall_timeout: flags.EngineStallTimeout = 300.0,
    block_size: flags.BlockSize = 64,
    kv_cache_dtype: flags.KvCacheDtype = words.CacheDtype.auto,
    num_gpu_blocks_override: flags.NumGpuBlocksOverride = None,
    kv_cache_memory: flags.KvCacheMemory = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = 0.9,
    host_cache_gib: flags.HostCacheGib = 0.0,
    enable_prefix_caching: flags.EnablePrefixCaching = True,
    max_waiting: flags.MaxWaiting = 1024,
    max_logprobs: flags.MaxLogprobs = 20,
    chat_template: flags.ChatTemplate = None,
    generation_config: flags.GenerationConfig = "auto",
    tool_call_parser: flags.ToolCallParser = words.ToolParser.auto,
    reasoning_parser: flags.ReasoningParser = words.ReasoningParser.auto,
    prefill: flags.Prefill = 0,
    decode: flags.Decode = 0,
    prefill_tensor_parallel_size: flags.PrefillTensorParallelSize = None,
    decode_tensor_parallel_size: flags.DecodeTensorParallelSize = None,
    prefill_policy: flags.PrefillPolicy = None,
    local_prefill_tokens: flags.LocalPrefillTokens = None,
    replan: flags.Replan = None,
    cluster: flags.Cluster = None,
    kv_host: flags.KvHost = None,
    kv_port: flags.KvPort = None,
    kv_nixl: flags.KvNixl = False,
    disable_log_requests: flags.DisableLogRequests = False,
    goodput: flags.Goodput = None,
    otlp_traces_endpoint: flags.OtlpTracesEndpoint = None,
    disable_log_stats: flags.DisableLogStats = False,
    record: flags.Record = None,
    warm_up_only: flags.WarmUpOnly = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API."""
    # imported here so that `benthic --help` needs neither FastAPI nor tokenizers
    from benthic.dash.page import DashPage  # noqa: PLC0415
    from benthic.serve import http, launch, server, speculative  # noqa: PLC0415
    from benthic.serve.fleet import Fleet, FleetOptions, load_instance  # noqa: PLC0415
    from benthic.serve.options import EngineOptions  # noqa: PLC0415
    from benthic.serve.seats import Seat  # noqa: PLC0415
    from benthic.serve.service import ServiceSettings  # noqa: PLC0415
    from benthic.serve.tokenizer import Tokenizer  # noqa: PLC0415
    from benthic.spec.objectives import Objectives  # noqa: PLC0415

    folder = words.one_model(model, model_flag)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    options = EngineOptions(
        device=device,
        dtype=dtype.value,
        load_format=load_format.value,
        quantization=quantization.value,
        kv_cache_dtype=kv_cache_dtype.value,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        enforce_eager=enforce_eager,
        enable_dbo=enable_dbo,
        dbo_prefill_token_threshold=dbo_prefill_token_threshold,
        async_scheduling=async_scheduling,
        late_planning_ms=late_planning_ms,
        batch_invariant=batch_invariant,
        cudagraph_capture_sizes=tuple(cudagraph_capture_sizes or ()),
        max_cudagraph_capture_size=max_cudagraph_capture_size,
        max_prompt_graph_size=max_prompt_graph_size,
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
        record=words.recording(record),
    )
    answering = http.ServerOptions(
        api_keys=words.api_keys(api_key),
        max_body_bytes=max_body_bytes,
        requests_per_minute=max_requests_per_minute,
        drain_s=shutdown_timeout,
        objectives=Objectives.parse(goodput or ()),
        report_s=0.0 if disable_log_stats else 10.0,
        stall_s=engine_stall_timeout,
        log_level=uvicorn_log_level.value,
        access_log=not disable_uvicorn_access_log,
        otlp_traces_endpoint=words.traces_endpoint(otlp_traces_endpoint),
        fronts=api_server_count,
    )
    launch.check_instances(
        options,
        prefill=prefill,
        decode=decode,
        prefill_policy=prefill_policy,
        local_tokens=local_prefill_tokens,
        kv_host=kv_host,
        kv_port=kv_port,
        kv_nixl=kv_nixl,
        replan=replan,
        cluster=cluster,
        prefill_ranks=prefill_tensor_parallel_size,
        decode_ranks=decode_tensor_parallel_size,
    )
    fleet: Fleet | None = None
    if prefill or decode:
        spread = FleetOptions(
            prefill=prefill,
            decode=decode,
            replan_s=replan,
            prefill_ranks=prefill_tensor_parallel_size,
            decode_ranks=decode_tensor_parallel_size,
            **words.given(prefill_policy=prefill_policy, local_tokens=local_prefill_tokens),
        )
        fleet = Fleet(checkpoint=folder, engine=options, options=spread, cluster=cluster, nixl=kv_nixl)
    elif data_parallel_size > 1:
        together = FleetOptions.together(data_parallel_size)
        fleet = Fleet(checkpoint=folder, engine=options, options=together)
    bound = launch.bind(host, 0 if warm_up_only else port)
    config = launch.check_checkpoint(folder, weights=load_format is words.LoadFormat.auto)
    for engine in (options,) if fleet is None else fleet.engines.values():
        launch.check_division(engine, config)
    build = functools.partial(launch.load_engine, folder, options) if fleet is None else fleet
    if kv_port is not None:
        reached = f"tcp://{kv_host or '127.0.0.1'}:{kv_port}"
        build = functools.partial(load_instance, folder, options, reached, Seat(), nixl=kv_nixl)
    if warm_up_only:
        raise typer.Exit(server.run_warm_up(build, answering))
    tokenizer = Tokenizer.from_folder(folder)
    template = launch.read_template(tokenizer, chat_template)
    parts = http.Parts(
        tokenizer=tokenizer,
        template=template,
        settings=ServiceSettings(
            served_names=tuple(served_model_name or [str(folder)]),
            root=str(folder),
            max_num_seqs=max_num_seqs * max(1, decode, data_parallel_size),
            max_waiting=max_waiting,
            defaults=launch.read_sampling_defaults(folder, generation_config),
            request_timeout_s=request_timeout,
            formats=launch.answer_formats(template, tool_call_parser.value, reasoning_parser.value),
            log_requests=not disable_log_requests,
            kv_transfer=kv_port is not None,
        ),
        options=answering,
        wall=time.time,
        page=DashPage,
    )
    raise typer.Exit(server.run(build, bound, parts))


AS_SERVE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""A command that hands its words on to `benthic serve`."""


def warmup(context: typer.Context) -> None:
    """Compile what `benthic serve` with the same arguments would, and end.

    A first start on a machine compiles kernels; what is compiled is kept for the next.
    """
    group = context.find_root().command
    group.main(["serve", *context.args, "--warm-up-only"], prog_name="benthic")
