"""The hybrid families against transformers, in float32: one entry of `tiny_hybrids.TINY` a family.

Attention inside the references is transformers' own, over one document at a time; everything else is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cispo.errors import UserError
from cispo.policies.attention import Documents, SharedPrompts
from cispo.policies.cache import Cache
from cispo.policies.hybrid.model import FLOAT32
from cispo.policies.layers import CentredRMSNorm
from cispo.policies.loading import check_weights, init_policy, load_policy, save_policy
from cispo.policies.moe import expert_counts, router_aux_loss
from cispo.policies.policy import Policy, PolicyOutput
from tests.tiny_hybrids import TINY, VARIANTS, VOCAB, save, with_stable_ties
from tests.tiny_policies import assert_close, bounds, logprobs, tokens_of

LENGTHS = [27, 70, 1, 0, 30, 2]
TOKENS = tokens_of(sum(LENGTHS), VOCAB, seed=7)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
PROJECTION = torch.randn(len(TOKENS), VOCAB, generator=torch.Generator().manual_seed(1)) / len(TOKENS)


@dataclass(frozen=True)
class Pair:
    """transformers' model of a family, and the policy that its folder gives."""

    family: str
    model: PreTrainedModel
    folder: Path
    policy: Policy
    tolerance: float


@pytest.fixture(scope="module", params=list(TINY))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model = save(family, folder)
    yield Pair(family, model, folder, load_policy(folder), TINY[family].tolerance)


def forward(policy: Policy, routes: Tensor | None = None) -> PolicyOutput:
    return policy(TOKENS, POSITIONS, bounds(LENGTHS), max(LENGTHS), routes)


def outputs_of(policy: Policy, routes: Tensor | None = None) -> Tensor:
    """Log-probabilities [T, V]."""
    return F.linear(forward(policy, routes).hidden, policy.lm_head_weight).log_softmax(-1)


def reference(model: PreTrainedModel) -> Tensor:
    """transformers' log-probabilities, each document by itself, [T, V]."""
    parts = [part for part in TOKENS.split(LENGTHS) if len(part)]
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts]).log_softmax(-1)


def gradients_of(policy: Policy, output: Tensor) -> dict[str, Tensor]:
    """Of a random projection of `output`, for each parameter; zeros where it has none."""
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad((output * PROJECTION).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def assert_gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each weight's gradient, relative to the largest entry of it."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_close(ours[name], expected, tolerance * float(expected.abs().max()))


# --- against transformers --------------------------------------------------------------------------------------------


def test_packed_logprobs_equal_transformers(pair: Pair) -> None:
    """Over the whole vocabulary, twice the family's tolerance, since both sides round: 2e-5.

    With gated DeltaNet 6e-5: transformers is up to 4.3e-5 from float64, by the processor.
    """
    with torch.no_grad():
        assert_close(outputs_of(pair.policy), reference(pair.model), 2 * pair.tolerance)


def test_gradients_of_the_whole_policy_equal_transformers(pair: Pair, tmp_path: Path) -> None:
    """1e-4 relative to the largest of each weight.

    transformers' gradients are written as a checkpoint of their own, so that names and fused experts need no mapping
    here.
    """
    ours = gradients_of(pair.policy, outputs_of(pair.policy))
    pair.model.zero_grad()
    (reference(pair.model) * PROJECTION).sum().backward()
    values = {name: parameter.detach().clone() for name, parameter in pair.model.named_parameters()}
    try:
        for parameter in pair.model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pair.model.save_pretrained(tmp_path)
    finally:
        for name, parameter in pair.model.named_parameters():
            parameter.data = values[name]
        pair.model.zero_grad()
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    theirs = {name: p.detach() for name, p in load_policy(tmp_path).named_parameters()}
    untrained = {name for name, gradient in theirs.items() if not gradient.any()}
    assert untrained == {name for name in theirs if ".indexer." in name}
    theirs = {name: gradient for name, gradient in theirs.items() if name not in untrained}
    assert_gradients_close(ours, theirs, 1e-4)


def test_folders_are_written_as_transformers_reads_them(pair: Pair, tmp_path: Path) -> None:
    """A saved policy's weights load in transformers bit for bit, none unknown or missing, and give equal logits.

    1e-5: the last bits of a product depend on where its operands lie in memory.
    """
    save_policy(pair.policy, tmp_path)
    model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in pair.model.state_dict().items())
    tokens = TOKENS[None, :50]
    with torch.no_grad():
        models = pair.model, with_stable_ties(model.eval())
        theirs, again = (m(input_ids=tokens, use_cache=False).logits for m in models)
    assert_close(theirs, again)
    assert load_policy(tmp_path).hf_config() == pair.policy.hf_config()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_other_values_of_the_keys(variant: str, tmp_path: Path) -> None:
    """Packed log-probabilities, names on disk both ways, and a folder that transformers reads."""
    model = save(variant, tmp_path / "theirs")
    policy = load_policy(tmp_path / "theirs")
    with torch.no_grad():
        assert_close(outputs_of(policy), reference(model), VARIANTS[variant].tolerance)
    assert set(policy.to_hf()) == set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert policy.router_shape[0] == len(forward(policy).router)
    save_policy(policy, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    with torch.no_grad():
        theirs, ours = (m(input_ids=TOKENS[None, :50], use_cache=False).logits for m in (model, again.eval()))
    assert_close(theirs, ours)


def test_the_text_model_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    """Qwen3.5 as it is released: prefixes, a vision tower, experts of a layer in two tensors, MTP beside it."""
    save("qwen3_5_moe", tmp_path / "text")
    text = load_policy(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    weights = {name.replace("model.", "model.language_model.", 1): w for name, w in text.to_hf().items()}
    weights = {name: w for name, w in weights.items() if ".experts." not in name}
    for name, parameter in text.named_parameters():
        if ".experts." in name:
            weights[f"model.language_model.{name}"] = parameter.detach()
    weights["model.visual.patch_embed.proj.weight"] = torch.randn(4, 3)
    weights["mtp.fc.weight"] = torch.randn(3, 2)
    folder = tmp_path / "released"
    folder.mkdir()
    save_file({name: w.contiguous().clone() for name, w in weights.items()}, folder / "model.safetensors")
    whole = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {key: value for key, value in config.items() if key != "architectures"},
        "vision_config": {"depth": 2},
        "image_token_id": 7,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    policy = load_policy(folder)
    assert policy.hf_config()["model_type"] == "qwen3_5_moe_text"
    assert policy.hf_config()["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert policy.kept.keys() == {"mtp.fc.weight"}
    assert all(torch.equal(w, text.named_weights()[name]) for name, w in policy.named_weights().items())
    (folder / "config.json").write_text(json.dumps({**whole, "text_config": None}))
    with pytest.raises(UserError, match="lacks 'text_config'"):
        load_policy(folder)


# --- packing and caches ----------------------------------------------------------------------------------------------


def test_packed_equals_separate(pair: Pair) -> None:
    """Outputs within 1e-5 (GDN 3e-5, as against transformers), gradients within 1e-4 relative."""
    policy = pair.policy
    packed = outputs_of(policy)
    separate = torch.cat([logprobs(policy, part) for part in TOKENS.split(LENGTHS) if len(part)])
    assert_close(packed.detach(), separate.detach(), pair.tolerance)
    assert_gradients_close(gradients_of(policy, packed), gradients_of(policy, separate), 1e-4)


def test_other_documents_do_not_matter(pair: Pair) -> None:
    """Nor do a document's own later tokens; the last bits move with the sizes of the experts' products."""
    lengths, positions = [40, 40, 40], torch.arange(40).repeat(3)
    tokens, other = tokens_of(120, VOCAB), tokens_of(120, VOCAB, seed=1)
    other[40:80] = tokens[40:80]
    later = tokens.clone()
    later[70:80] = (tokens[70:80] + 1) % VOCAB
    with torch.no_grad():
        first, second, third = (pair.policy(t, positions, bounds(lengths)).hidden for t in (tokens, other, later))
    assert_close(first[40:80], second[40:80], pair.tolerance)
    assert not torch.allclose(first[:40], second[:40])
    assert_close(first[40:70], third[40:70], pair.tolerance)


def test_shared_prompts_equal_documents(pair: Pair) -> None:
    """Two continuations of one prompt, which passes the layers once."""
    prompt, rest = tokens_of(30, VOCAB), tokens_of(41, VOCAB, seed=2)
    tokens = torch.cat([prompt, rest[:23], prompt, rest[23:]])
    lengths = [53, 48]
    positions = torch.cat([torch.arange(n) for n in lengths])
    inverse = torch.cat([torch.arange(53), torch.arange(30), torch.arange(53, 71)])
    unique = torch.cat([torch.arange(53), torch.arange(83, 101)])
    shared = SharedPrompts(Documents(bounds(lengths), len(tokens)), unique, inverse)
    with torch.no_grad():
        whole = pair.policy(tokens, positions, bounds(lengths)).hidden
        once = pair.policy.attend(tokens[unique], positions[unique], shared).hidden
    assert_close(once[inverse], whole, 10 * pair.tolerance)  # hidden states are of the order of 10


def test_a_samplers_cache_equals_the_full_pass(pair: Pair) -> None:
    """Ragged prompts, one of them shared by two rows, a row that ends early; then tokens one by one."""
    policy, cache = pair.policy, Cache()
    prompts = [tokens_of(n, VOCAB, seed=n) for n in (10, 33, 1, 64, 2)]
    copies = [0, 1, 2, 3, 4, 1]
    rows = [prompts[i] for i in copies]
    steps = tokens_of(6 * 25, VOCAB, seed=3).view(25, 6)
    with torch.no_grad():
        hidden = cache.read(policy, [p.tolist() for p in prompts], copies)
        found = [[h] for h in hidden]
        alive = list(range(6))
        for step, tokens in enumerate(steps):
            if step == 12:
                gone = torch.tensor([False, True, False, False, False, False])
                alive = [alive[i] for i in cache.drop(gone).tolist()]
            hidden = cache.step(policy, tokens[alive])
            for row, h in zip(alive, hidden, strict=True):
                found[row].append(h)
                rows[row] = torch.cat([rows[row], tokens[row : row + 1]])
        for row, sequence in enumerate(rows):
            cached = F.linear(torch.stack(found[row]), policy.lm_head_weight).log_softmax(-1)
            # Both forms are up to the tolerance from float64.
            assert_close(cached, logprobs(policy, sequence)[-len(cached) :], 2 * pair.tolerance)


def test_gradient_checkpointing_changes_nothing(pair: Pair) -> None:
    policy = pair.policy
    plain = gradients_of(policy, outputs_of(policy))
    policy.gradient_checkpointing = True
    try:
        again = gradients_of(policy, outputs_of(policy))
    finally:
        policy.gradient_checkpointing = False
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_from_hf_of_to_hf_is_the_same_bit_for_bit(pair: Pair, dtype: torch.dtype) -> None:
    """Buffers included; decays and correction biases stay float32 in a bfloat16 policy."""
    policy, other = load_policy(pair.folder, dtype), init_policy(TINY[pair.family].hf_config, seed=3, dtype=dtype)
    other.load_hf(policy.to_hf().items())
    ours, theirs = policy.named_weights(), other.named_weights()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name])
        assert weight.dtype == (torch.float32 if name.rpartition(".")[2] in FLOAT32 else dtype)
    on_disk = set(load_file(pair.folder / "model.safetensors"))
    for theirs, release in TINY[pair.family].renamed.items():
        on_disk = {name.replace(theirs, release) for name in on_disk}
    assert {name for name, _ in policy.disk_places()} == on_disk


def test_config_is_written_back(pair: Pair) -> None:
    """Keys that no block reads survive; those that describe other weights do not."""
    source = {
        "quantization_config": {"quant_method": "fp8"},
        "torch_dtype": "bfloat16",
        "im_end": [3],
        "eos_token_id": 5,
    }
    config = init_policy({**TINY[pair.family].hf_config, **source}, seed=0).hf_config()
    assert config["im_end"] == [3] and config["eos_token_id"] == 5 and config["dtype"] == "float32"
    assert "quantization_config" not in config and "torch_dtype" not in config
    assert init_policy(config, seed=0).hf_config() == config


def test_weights_that_are_not_run_are_written_back(pair: Pair, tmp_path: Path) -> None:
    """Layers of multi-token prediction: kept in their own dtype, in folders, and out of what engines get."""
    kept = TINY[pair.family].kept
    if not kept:
        pytest.skip("the family has none")
    extra = {name: torch.randn(3, 2, dtype=torch.bfloat16) for name in kept}
    config = {**json.loads((pair.folder / "config.json").read_text()), **TINY[pair.family].kept_config}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file({**load_file(pair.folder / "model.safetensors"), **extra}, source / "model.safetensors")
    check_weights(source)
    policy = load_policy(source)
    assert not set(extra) & set(policy.to_hf())
    save_policy(policy, tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert all(written[name].dtype == torch.bfloat16 for name in extra)


def test_new_policies_start_neutral(pair: Pair) -> None:
    """Norms multiply by 1, decays lie between almost none and strong, and the policy does not explode."""
    config = TINY[pair.family].hf_config
    policy, again = init_policy(config, seed=5), init_policy(config, seed=5)
    for name, weight in policy.named_weights().items():
        assert torch.equal(weight, again.named_weights()[name])
        module, _, leaf = name.rpartition(".")
        if leaf == "A_log":
            assert 0 <= weight.min() and weight.max() <= 2.8
        elif leaf == "dt_bias":
            assert -7 < weight.min() and weight.max() < -2.2
        elif leaf == "e_score_correction_bias":
            assert not weight.any()
        elif weight.ndim == 1:
            centred = isinstance(policy.get_submodule(module), CentredRMSNorm)
            assert (weight == (0.0 if centred or leaf == "bias" else 1.0)).all()
    with torch.no_grad():
        entropy = -(outputs_of(policy).exp() * outputs_of(policy)).sum(-1)
    assert 0.5 < entropy.mean() <= 4.16


def test_bad_configs_are_one_sentence(pair: Pair) -> None:
    config = TINY[pair.family].hf_config
    for key, value, message in [
        ("vocab_size", None, "lacks 'vocab_size'"),
        ("hidden_size", "128", "hidden_size '128' must be a whole number"),
        ("hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
        ("rms_norm_eps", -1.0, "rms_norm_eps -1.0 must be a number above 0"),
    ]:
        with pytest.raises(UserError, match=message):
            init_policy({**config, key: value}, seed=0)


# --- router replay ---------------------------------------------------------------------------------------------------


@pytest.fixture
def routed(pair: Pair) -> Pair:
    if not pair.policy.router_shape[0]:
        pytest.skip("the family has no experts")
    return pair


def own_routes(policy: Policy) -> Tensor:
    """[T, layers, k] int64."""
    with torch.no_grad():
        return torch.stack([layer.chosen for layer in forward(policy).router], 1)


def test_own_routes_change_nothing(routed: Pair) -> None:
    """Bit for bit, outputs and gradients, also of a small integer dtype and where rows of -1 leave the choice."""
    policy, routes = routed.policy, own_routes(routed.policy)
    assert routes.shape[1] == policy.router_shape[0]
    live = outputs_of(policy)
    plain = gradients_of(policy, live)
    some = routes.to(torch.int16)
    some[::3] = -1
    for replay in (routes, some, torch.full_like(routes, -1)):
        output = outputs_of(policy, replay)
        assert torch.equal(output, live)
        replayed = gradients_of(policy, output)
        assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_replayed_experts_stay_when_the_routers_change(routed: Pair) -> None:
    """The chosen stay, weights and gradients are those of the changed routers; the balance loss counts the chosen.

    That loss is k where load and probabilities are even. Layers are recomputed with the same routes.
    """
    routes = own_routes(routed.policy)
    policy = load_policy(routed.folder)
    generator = torch.Generator().manual_seed(0)
    routers = [name for name, _ in policy.named_parameters() if name.endswith("mlp.gate.weight")]
    with torch.no_grad():
        for name in routers:
            weight = policy.get_parameter(name)
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    partly = routes.clone()
    partly[-1] = -1
    output = forward(policy, partly)
    live = own_routes(policy)
    assert (live != routes).any(-1).float().mean() > 0.2
    experts = policy.router_shape[1]
    for number, layer in enumerate(output.router):
        assert torch.equal(layer.chosen[:-1], routes[:-1, number])
        everything = torch.ones(len(TOKENS) - 1, dtype=torch.bool)
        counts = expert_counts(layer.chosen[:-1], everything, experts)
        assert torch.equal(counts, torch.bincount(routes[:-1, number].flatten(), minlength=experts).float())
        assert_close(layer.probs.sum(-1), torch.ones(len(TOKENS)))
    mask = torch.arange(len(TOKENS)) % 3 > 0
    counted = [expert_counts(layer.chosen, mask, experts) for layer in output.router]
    balance = router_aux_loss([layer.probs for layer in output.router], mask, counted, float(mask.sum()))
    top_k = routes.shape[-1]
    assert 0.9 * top_k < float(balance.detach()) < experts
    weights = [policy.get_parameter(name) for name in routers]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(balance, weights))
    plain = gradients_of(policy, outputs_of(policy, partly))
    assert all(plain[name].abs().max() > 0 for name in routers)
    policy.gradient_checkpointing = True
    again = gradients_of(policy, outputs_of(policy, partly))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
