"""The network against transformers: logits, the gradient of every parameter, checkpoints both ways."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_models import LENGTHS, VARIANTS, furthest, packed, random_model

from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.local import plain_linear
from benthic.model.rope_layout import to_interleaved
from benthic.spec.parameters import parameters

pytestmark = pytest.mark.hf

transformers = pytest.importorskip("transformers")


def load_in_transformers(path):
    """The checkpoint as a transformers model; nothing may be missing, left over or of another shape."""
    kind = json.loads((path / "config.json").read_text())["model_type"]
    cls = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}[kind]
    model, report = getattr(transformers, cls).from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    missing = {name for name in report["missing_keys"] if model.get_parameter(name).numel()}
    assert not missing
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def pair(request, tmp_path_factory):
    """A model of ours, and the same weights as transformers loads our export of it."""
    path = tmp_path_factory.mktemp("export")
    ours = random_model(VARIANTS[request.param])
    save_pretrained(ours, path, dtype=torch.float32, max_shard_bytes=60_000)
    return ours, load_in_transformers(path)


def our_logits(model):
    tokens_T, positions_T, _, sockets = packed(model.config)
    return model.logits(model(tokens_T, positions_T, sockets).hidden_TD, plain_linear)


def their_logits(theirs, config):
    """Each sequence alone, so that packing is tested too."""
    tokens_T = packed(config)[0]
    return torch.cat([theirs(input_ids=row[None]).logits[0] for row in tokens_T.split(LENGTHS)])


def their_gradient(theirs, name):
    """The gradient of one tensor of the checkpoint; transformers keeps all experts in two tensors."""
    if ".experts." not in name:
        return dict(theirs.named_parameters())[name].grad
    stem, rest = name.split(".experts.")
    expert, matrix, _ = rest.split(".")
    experts = theirs.get_submodule(f"{stem}.experts")
    if matrix == "down_proj":
        return experts.down_proj.grad[int(expert)]
    gate, up = experts.gate_up_proj.grad[int(expert)].chunk(2)
    return gate if matrix == "gate_proj" else up


def test_logits_equal_those_of_transformers_on_our_export(pair):
    ours, theirs = pair
    with torch.no_grad():
        assert furthest(our_logits(ours), their_logits(theirs, ours.config)) < 1e-5


def test_gradient_of_every_parameter_equals_that_of_transformers(pair):
    ours, theirs = pair
    config = ours.config
    direction_TV = torch.randn(sum(LENGTHS), config.vocab_size, generator=torch.Generator().manual_seed(3))
    ours.zero_grad()
    theirs.zero_grad()
    (our_logits(ours) * direction_TV).sum().backward()
    (their_logits(theirs, config) * direction_TV).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for param in parameters(config):
        if not param.trainable:
            continue
        gradient = gradients.pop(param.name)
        if param.rope_rows and config.rope_interleave:
            gradient = to_interleaved(gradient, param)
        for tensor in param.hf:
            expected = their_gradient(theirs, tensor.name)
            assert furthest(gradient[tensor.index], expected) < 1e-4, tensor.name
            compared += 1
    assert not gradients
    assert compared > 30


def test_checkpoint_that_transformers_writes_loads_with_the_same_logits(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    again = load_pretrained(tmp_path, mtp=False)
    with torch.no_grad():
        assert furthest(our_logits(again), our_logits(ours)) < 1e-6


def test_transformers_reads_the_main_model_of_an_export_with_mtp(tmp_path):
    config = replace(VARIANTS["q-lora, groups, interleaved"], num_nextn_predict_layers=1)
    ours = random_model(config)
    save_pretrained(ours, tmp_path, dtype=torch.float32)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert furthest(our_logits(ours), their_logits(theirs.eval(), config)) < 1e-5
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["model.layers.3.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], stored["lm_head.weight"])
