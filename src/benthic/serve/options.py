"""The engine's settings, named as on the command line of the servers people already run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.serve.speculative import Speculative

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtypeName = Literal["auto", "fp8", "fp8_e4m3"]
LoadFormatName = Literal["auto", "dummy"]
QuantizationName = Literal["auto", "fp8", "none"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How one engine runs.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; "auto" takes a GPU if there is one.
        dtype: of weights and cache; "auto" keeps the checkpoint's on a GPU and takes float32 on a CPU.
        load_format: "auto" reads the checkpoint's weights; "dummy" reads only its config and tokenizer and
            draws weights by `seed`, the same in every instance, to measure speed without a checkpoint.
        quantization: "auto" keeps the FP8 weights of a checkpoint as they are on a GPU and widens them on a
            CPU; "fp8" keeps them anywhere, and quantises others (128 x 128 blocks); "none" widens them.
        tensor_parallel_size: ranks, each on a device of its own, that hold a shard of the model and compute
            every step together; on GPUs they take those from `device` on.
        data_parallel_size: engines that each have requests of their own, on a device of their own, and all
            of the model but the routed experts, of which each holds some; they step together.
        enable_expert_parallel: each of them holds whole experts instead of a part of every expert's width.
        enable_dbo: engines that step together run a step as written in two halves, so that one computes while
            the rows of the other travel; see `benthic.serve.halves`.
        dbo_prefill_token_threshold: rows of a step from which on they do.
        kv_cache_dtype: "auto" stores latents as activations are; "fp8" (or "fp8_e4m3") in E4M3, unscaled.
        max_model_len: longest prompt plus output; None takes the model's `max_position_embeddings`.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: token budget of one step (prefill chunks are cut to it).
        block_size: tokens in a cache block.
        num_blocks: blocks in the cache; None sizes it by `kv_cache_memory` or `gpu_memory_utilization`.
        kv_cache_memory: bytes of the cache; None means `gpu_memory_utilization` on a GPU and, on a CPU, room
        for
            `max_num_seqs` sequences of `max_model_len` but no more than 1 GiB.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and cache together.
        host_cache_gib: host memory, over all ranks, for prefix-cache blocks that are evicted from the device.
        enable_prefix_caching: reuse blocks of equal prompt beginnings.
        seed: from which requests without a seed get theirs, in order of arrival.
        max_logprobs: the most log-probabilities a request may ask for at one position.
        num_threads: CPU threads of torch; None takes all cores but one, which HTTP and clients need, when the
            engine runs on a CPU, and torch's choice on a GPU.
        enforce_eager: run every step as it is written, without tapes (CPU) or graphs (GPU).
        async_scheduling: plan and launch a step while the one before runs; None does so on a GPU.
        late_planning_ms: with `async_scheduling`, plan a step only so long (beside what the host takes)
            before the one in flight should end, with the requests that came meanwhile; None plans at once.
        cudagraph_capture_sizes: padded batch sizes of the graphs; empty takes 1, 2, 4, then every 8th (above
            256 every 16th).
        max_cudagraph_capture_size: largest batch that has a graph; larger ones run as written. 0: no graphs.
        max_prompt_graph_size: most rows of a step with prompts that has a graph. 0: no such graphs.
        speculative: who drafts tokens for the model to verify, and how many; None drafts nothing.
        native_folder: where compiled CPU kernels are kept; None leaves it to `kernels.native_build`.
        share_pages: lay the cache where other processes on this host can read it.
        lease_seconds: how long a held request's blocks stay for their reader without a sign of it.
        batch_invariant: a token's scores have the same bits whatever else is in the batch, with drafts or
            without, however its prompt was chunked or cached; see `benthic.serve.invariant`.
        record: file that gets every call to the scheduler as a JSON line, for `benthic.sched.replay`; each
            instance of a fleet has one beside it, NAME.jsonl.
    """

    device: str = "cpu"
    dtype: DtypeName = "auto"
    load_format: LoadFormatName = "auto"
    quantization: QuantizationName = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_dbo: bool = False
    dbo_prefill_token_threshold: int = 512
    kv_cache_dtype: CacheDtypeName = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 64
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    host_cache_gib: float = 0.0
    enable_prefix_caching: bool = True
    seed: int = 0
    max_logprobs: int = 20
    num_threads: int | None = None
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    late_planning_ms: float | None = None
    cudagraph_capture_sizes: tuple[int, ...] = ()
    max_cudagraph_capture_size: int = 512
    max_prompt_graph_size: int = 4096
    speculative: Speculative | None = None
    native_folder: str | None = None
    share_pages: bool = False
    lease_seconds: float = 30.0
    batch_invariant: bool = False
    record: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value}, but it must be at least 1"
            for name, value in (
                ("tensor_parallel_size", self.tensor_parallel_size),
                ("data_parallel_size", self.data_parallel_size),
                ("dbo_prefill_token_threshold", self.dbo_prefill_token_threshold),
                ("max_model_len", self.max_model_len),
                ("max_num_seqs", self.max_num_seqs),
                ("max_num_batched_tokens", self.max_num_batched_tokens),
                ("block_size", self.block_size),
                ("num_blocks", self.num_blocks),
                ("kv_cache_memory", self.kv_cache_memory),
                ("num_threads", self.num_threads),
            )
            if value is not None and value < 1
        ]
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            problems.append(f"device = {self.device!r}, but it must be auto, cpu, cuda or cuda:N")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            problems.append(
                f"gpu_memory_utilization = {self.gpu_memory_utilization}, but it must lie in (0, 1]"
            )
        if self.host_cache_gib and not self.enable_prefix_caching:
            problems.append(
                f"host_cache_gib = {self.host_cache_gib} keeps blocks for the prefix cache, but "
                "enable_prefix_caching = False; leave out one or the other"
            )
        if self.batch_invariant and self.ranks > 1:
            degree = "data_parallel_size" if self.data_parallel_size > 1 else "tensor_parallel_size"
            problems.append(
                f"batch_invariant = True needs {degree} = 1, not {self.ranks}: "
                "the order of sums over ranks depends on their size; leave out one or the other"
            )
        if self.batch_invariant and self.quantization == "fp8":
            problems.append(
                'batch_invariant = True multiplies no FP8 weights, but quantization = "fp8"; take "none"'
            )
        problems += [
            f"{name} = {value}, but it must be at least 0"
            for name, value in (
                ("host_cache_gib", self.host_cache_gib),
                ("max_logprobs", self.max_logprobs),
                ("max_cudagraph_capture_size", self.max_cudagraph_capture_size),
                ("max_prompt_graph_size", self.max_prompt_graph_size),
            )
            if value < 0
        ]
        if any(size < 1 for size in self.cudagraph_capture_sizes):
            least = min(self.cudagraph_capture_sizes)
            problems.append(f"cudagraph_capture_sizes holds {least}, but a batch has at least 1 sequence")
        if self.num_blocks is not None and self.kv_cache_memory is not None:
            problems.append(
                f"num_blocks = {self.num_blocks} and kv_cache_memory = {self.kv_cache_memory} both size the "
                "cache; give one"
            )
        if self.enable_dbo and self.data_parallel_size == 1:
            problems.append(
                "enable_dbo = True overlaps the exchange among engines that share experts, but "
                "data_parallel_size = 1; leave it out, or give --data-parallel-size too"
            )
        problems += [] if self.data_parallel_size == 1 else self._problems_together()
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def ranks(self) -> int:
        """How many devices share the weights."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def most_drafts(self) -> int:
        """Drafts of a sequence in one step at most."""
        return 0 if self.speculative is None else self.speculative.num_speculative_tokens

    def _problems_together(self) -> list[str]:
        """What engines that step together cannot do."""
        size, problems = self.data_parallel_size, []
        if not self.enable_expert_parallel:
            problems.append(
                f"data_parallel_size = {size} divides whole experts, but enable_expert_parallel = False; "
                f"give --enable-expert-parallel too, or --decode {size} for engines that share nothing"
            )
        if self.tensor_parallel_size > 1:
            problems.append(
                f"data_parallel_size = {size} and tensor_parallel_size = {self.tensor_parallel_size}, but "
                "attention is either whole on each rank or divided; give one of them"
            )
        if self.late_planning_ms is not None:
            problems.append(
                f"data_parallel_size = {size} and late_planning_ms = {self.late_planning_ms}, but engines "
                "that step together cannot each choose when; leave out one of them"
            )
        return problems
