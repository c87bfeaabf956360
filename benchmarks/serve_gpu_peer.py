"""The transformers library at the shape of one of our configs, with weights drawn like ours."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig


class Peer:
    """A random model; a shape that does not fit into memory gives None instead of seconds."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        self._device = device
        self._vocab = config.vocab_size
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        settings = transformers.DeepseekV3Config(**_fields(config))
        with torch.device(device):
            self._model = transformers.AutoModelForCausalLM.from_config(
                settings, dtype=dtype, attn_implementation="sdpa"
            ).eval()
        self._spread(config)

    @torch.no_grad()
    def _spread(self, config: ModelConfig) -> None:
        """As `serve_gpu.balanced_model`: random tokens spread over the experts."""
        generator = torch.Generator(self._device).manual_seed(0)
        last = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for name, weight in self._model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
                continue
            ends = "o_proj" in name or "down_proj" in name
            std = 1.0 if "embed_tokens" in name else 0.01 if "lm_head" in name else last if ends else 0.02
            weight.normal_(0.0, std, generator=generator)

    @torch.inference_mode()
    def prefill(self, count: int, length: int, repeats: int) -> float | None:
        """Median seconds of one forward over all prompts, logits of the last token alone."""
        seconds = []
        try:
            for _ in range(repeats + 1):
                prompts = torch.randint(0, self._vocab, (count, length), device=self._device)
                began = self._now()
                self._model(prompts, use_cache=True, logits_to_keep=1)
                seconds.append(self._now() - began)
        except torch.OutOfMemoryError:
            return None
        return statistics.median(seconds[1:])

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> float | None:
        """Seconds of a greedy step with its cache."""
        try:
            prompts = torch.randint(0, self._vocab, (batch, context), device=self._device)
            out: Any = self._model(prompts, use_cache=True, logits_to_keep=1)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            began = 0.0
            for step in range(steps + 3):
                if step == 3:
                    began = self._now()
                out = self._model(tokens, past_key_values=cache, use_cache=True)
                tokens = out.logits[:, -1:].argmax(-1)
            return (self._now() - began) / steps
        except torch.OutOfMemoryError:
            return None

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _fields(config: ModelConfig) -> dict[str, Any]:
    """The config under the library's names."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_shared_experts",
        "n_routed_experts",
        "routed_scaling_factor",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "norm_topk_prob",
        "max_position_embeddings",
        "rope_theta",
    )
    fields = {name: getattr(config, name) for name in names}
    return fields | {"num_key_value_heads": config.num_attention_heads, "tie_word_embeddings": False}
