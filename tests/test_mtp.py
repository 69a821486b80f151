"""Heads of multi-token prediction: the module, its loss, and its names on disk.

References: transformers' layers with the equations of arXiv 2412.19437, section 2.2, around them, a document at a time;
one document at a time in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cispo.batch.packing import pack
from cispo.errors import UserError
from cispo.learner.heads import HeadsLoss, heads_loss
from cispo.learner.loss import attention_of, read
from cispo.ops.logprobs import best_tokens
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.loading import check_weights, count_parameters, init_policy, load_policy, save_policy, shape_of
from cispo.policies.policy import Policy, heads_of
from cispo.recipe.drafts import asks_heads
from cispo.types import MicroBatch, Sample
from tests import tiny_hybrids
from tests.shard_group import prompts_shared
from tests.test_learner import samples
from tests.test_released_configs import DEEPSEEK_V3
from tests.test_shares import shares
from tests.tiny_hybrids import TINY, VARIANTS
from tests.tiny_policies import QWEN3, assert_close

HEADS = 2
FAMILIES = ("deepseek_v3", "glm4_moe")


def config_of(family: str, heads: int = HEADS) -> dict[str, Any]:
    return {**{**TINY, **VARIANTS}[family].hf_config, "num_nextn_predict_layers": heads}


def hybrid(policy: Policy) -> HybridPolicy:
    assert isinstance(policy, HybridPolicy)
    return policy


def drawn(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> HybridPolicy:
    """A policy with heads whose norms and biases are off their neutral values."""
    policy = hybrid(init_policy({**config, "initializer_range": 0.1}, seed, dtype, heads=True))
    generator = torch.Generator().manual_seed(seed + 3)
    with torch.no_grad():
        for weight in policy.named_weights().values():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return policy


def packed(given: list[Sample], *, budget: int = 60, shared: bool = False) -> list[MicroBatch]:
    """The micro-batches of a single rank."""
    options = {"max_tokens": 16, "tokens_per_micro_batch": budget, "share_prompts": shared}
    (mbs,) = pack(given, reduction="prompt", **options)  # type: ignore[arg-type]
    return mbs


def head_results(policy: HybridPolicy, mbs: list[MicroBatch]) -> tuple[HeadsLoss, dict[str, Tensor]]:
    """Loss and sums of all micro-batches, and the gradient of every parameter that has one."""
    policy.zero_grad()
    found = []
    for mb in mbs:
        found.append(heads_loss(policy, read(policy, mb).hidden, mb, temperature=1.3))
        found[-1].loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return HeadsLoss(sum(r.loss.detach() for r in found), sum(r.sums for r in found)), gradients  # type: ignore[arg-type]


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, each relative to the largest entry of its reference."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - t).abs().max() / t.abs().max().clamp(min=1e-30)) for n, t in theirs.items())


# --- the module ------------------------------------------------------------------------------------------------------


@dataclass
class Published:
    """transformers' model of a family with the heads' layers behind its own, and their other weights, in float64."""

    model: PreTrainedModel
    added: dict[str, Tensor]
    eps: float

    def losses(self, sample: Sample, weight: float) -> Iterator[Tensor]:
        """One a head and predicted token. Only positions with a next token and a label enter: slices of the paper."""
        inner, tokens = self.model.model, sample.token_ids
        embedded = inner.embed_tokens(tokens)
        layers = list(inner.layers)
        hidden = inner.norm(self.run(layers[:-HEADS], embedded[:-1])).detach()
        for number, layer in enumerate(layers[-HEADS:]):
            count = len(tokens) - 2 - number
            if count <= 0:
                return
            own = {name: self.added[f"model.layers.{len(layers) - HEADS + number}.{name}.weight"] for name in NAMES}
            following, before = embedded[1 + number : 1 + number + count].detach(), hidden[:count]
            both = [self.rms(following) * own["enorm"], self.rms(before) * own["hnorm"]]
            hidden = self.run([layer], torch.cat(both, -1) @ own["eh_proj"].T)
            states = self.rms(hidden) * own["shared_head.norm"]
            logprobs = (states @ self.model.lm_head.weight.detach().T / 1.3).log_softmax(-1)
            for position in range(count):
                target = position + 2 + number
                if sample.loss_mask[target]:
                    yield -logprobs[position, tokens[target]] * weight / HEADS

    def rms(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def run(self, layers: list[torch.nn.Module], x: Tensor) -> Tensor:
        positions = torch.arange(len(x))[None]
        mask = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        x, rotary = x[None], self.model.model.rotary_emb(x[None], positions)
        for layer in layers:
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return x[0]


NAMES = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


def published(family: str, folder: Path) -> Published:
    """Writes the folder that a release would have, with second names of embedding and LM head."""
    tiny = {**TINY, **VARIANTS}[family]
    layers = tiny_hybrids.COMMON["num_hidden_layers"]
    longer = replace(tiny, config={**tiny.config, "num_hidden_layers": layers + HEADS})
    VARIANTS["longer"] = longer
    try:
        model = tiny_hybrids.build("longer").double()
        model.set_experts_implementation("eager")  # the default takes no float64
    finally:
        del VARIANTS["longer"]
    generator, hidden, added = torch.Generator().manual_seed(8), tiny_hybrids.COMMON["hidden_size"], {}
    for number in range(layers, layers + HEADS):
        for name in NAMES:
            shape = (hidden, 2 * hidden) if name == "eh_proj" else (hidden,)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            value = noise * 0.08 if name == "eh_proj" else 1 + 0.2 * noise
            added[f"model.layers.{number}.{name}.weight"] = value.requires_grad_()
    write(model, added, family, folder)
    return Published(model, added, tiny.config["rms_norm_eps"])


def write(model: PreTrainedModel, added: dict[str, Tensor], family: str, folder: Path) -> None:
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {name: value.detach().clone() for name, value in added.items()}
    for name in {name.split(".")[2] for name in added}:
        weights[f"model.layers.{name}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{name}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_published_layers(family: str, tmp_path: Path) -> None:
    """float64, but for transformers' norms and both rotary tables in float32: 1e-6 of the loss, 1e-5 of each weight's
    largest gradient. Packed here, a document at a time there."""
    theirs = published(family, tmp_path / "policy")
    policy = hybrid(load_policy(tmp_path / "policy", torch.float64, heads=True))
    given = samples()
    mbs = packed(given, budget=10_000)
    ours, gradients = head_results(policy, mbs)
    weights = {mbs[0].sample_index[row]: row for row in range(len(given))}
    starts = mbs[0].cu_seqlens[:-1]
    total = torch.zeros((), dtype=torch.float64)
    for number, sample in enumerate(given):
        rows = mbs[0].loss_weights[int(starts[weights[number]]) :]
        weight = float(rows[rows > 0][0])
        total = total + sum(theirs.losses(sample, weight))
    total.backward()
    assert float(ours.loss) == pytest.approx(float(total.detach()), rel=1e-6)
    added = {name: value.grad for name, value in theirs.added.items() if value.grad is not None}
    assert added.keys() == theirs.added.keys()
    with torch.no_grad():
        for parameter in theirs.model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    write(theirs.model, added, family, tmp_path / "gradients")
    expected = dict(load_policy(tmp_path / "gradients", torch.float64, heads=True).named_parameters())
    trunk = {name for name in expected if not name.startswith("predictors.")}
    assert not trunk & gradients.keys() and not any(bool(expected[name].any()) for name in trunk)
    named = {name: value.detach() for name, value in expected.items() if name not in trunk}
    assert largest(gradients, named) <= 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("deepseek_v32", marks=pytest.mark.slow)])
def test_packing_shared_prompts_and_recomputation_change_nothing(family: str) -> None:
    """float64 against one document a micro-batch, with documents that are too short for a head: 1e-12 relative.

    Routers see the same numbers but for the order of sums, so no expert turns over.
    """
    policy = drawn(config_of(family, heads=3), dtype=torch.float64)
    # Positions count in float32 tables, which are the same in both.
    short = [
        replace(s, **{n: getattr(s, n)[:length] for n in PER_TOKEN})
        for s, length in zip(samples(3), (2, 3, 4), strict=True)
    ]
    short = [replace(s, loss_mask=torch.arange(len(s.token_ids)) > 0) for s in short]
    given = prompts_shared([*samples(), *short])
    alone, expected = head_results(policy, packed(given, budget=1))
    assert int(alone.sums[0]) < 3 * sum(s.num_loss_tokens for s in given), "every head predicts every token"
    for budget, shared, recomputed in ((10_000, False, False), (50, True, False), (10_000, True, True)):
        policy.gradient_checkpointing = recomputed
        mbs = packed(given, budget=budget, shared=shared)
        assert not shared or any(mb.unique_index is not None for mb in mbs)
        ours, gradients = head_results(policy, mbs)
        assert_close(ours.loss, alone.loss, 1e-12 * float(alone.loss))
        assert_close(ours.sums, alone.sums, 1e-12 * float(alone.sums.max()))
        assert largest(gradients, expected) <= 1e-12


PER_TOKEN = ("token_ids", "loss_mask", "rollout_logprobs", "versions", "advantages")


def test_predictions_are_counted_by_hand() -> None:
    """Document [a b c d e], c and e trained: head 0 predicts c from a's position and e from c's, head 1 e from b's."""
    policy = drawn(config_of("glm4_moe"))
    mask = torch.tensor([False, False, True, False, True])
    sample = replace(samples(1)[0], token_ids=torch.tensor([5, 9, 2, 7, 30]), loss_mask=mask)
    sample = replace(sample, rollout_logprobs=torch.zeros(5), versions=mask.int(), advantages=mask.float())
    (mb,) = packed([sample])
    with torch.no_grad():
        hidden = read(policy, mb).hidden
        found = heads_loss(policy, hidden, mb, temperature=1.0)
        attention = attention_of(mb)
        first = policy.predict(0, torch.tensor([9, 2, 7, 30]), mb.positions, hidden, attention)
        second = policy.predict(1, torch.tensor([2, 7, 30, 30]), mb.positions, first, attention)
        logits = [heads_of(policy)[n].norm(x) @ policy.lm_head_weight.T for n, x in enumerate((first, second))]
        rows = [(logits[0][0], 2), (logits[0][2], 30), (logits[1][1], 30)]
        nats = [-float(row.log_softmax(-1)[token]) for row, token in rows]
        right = sum(int(row.argmax()) == token for row, token in rows)
    # float32: the order of sums in a product.
    assert found.sums.tolist() == pytest.approx([3, sum(nats), right], rel=1e-6)
    assert float(found.loss) == pytest.approx(sum(nats) / 2 / 2, rel=1e-6)  # half a weight a token, two heads


def test_best_tokens_are_the_argmax_in_any_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(23, 8, generator=generator)
    weight[17] = weight[3]  # equal logits: the first
    expected = (hidden @ weight.T).argmax(-1)
    for rows in (1, 4, 100):
        assert torch.equal(best_tokens(hidden, weight, chunk_rows=rows), expected)
    assert len(best_tokens(hidden[:0], weight)) == 0


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v32"])
def test_shares_of_an_engines_ranks_are_the_heads_together(family: str) -> None:
    """Two ranks, float32: 2e-5 of log-probabilities, as for the policy (`test_shares.py`)."""
    policy = drawn(config_of(family))
    (mb,) = packed(samples(), budget=10_000)

    def run(one: HybridPolicy) -> list[Tensor]:
        with torch.no_grad():  # of each thread
            hidden, found, attention = read(one, mb).hidden, [], attention_of(mb)
            for number, head in enumerate(heads_of(one)):
                hidden = one.predict(number, mb.targets, mb.positions, hidden, attention)
                found.append((head.norm(hidden) @ one.lm_head_weight.T).log_softmax(-1))
            return found

    parts = shares(policy, 2)
    for part in parts:
        assert part.load(policy.checkpoint().items()) == set(part.policy.named_weights())
        assert part.policy.get_parameter("predictors.1.layer.self_attn.o_proj.weight").numel() * 2 == (
            policy.get_parameter("predictors.1.layer.self_attn.o_proj.weight").numel()
        )
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda part: run(hybrid(part.policy)), parts))
    for own in found:
        for ours, expected in zip(own, run(policy), strict=True):
            assert_close(ours, expected, 2e-5)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v32"])
def test_names_on_disk_are_those_of_releases_and_lead_back(family: str, tmp_path: Path) -> None:
    policy = drawn(config_of(family))
    for name, place in policy.disk_places():
        assert policy.place_of(name) == place
    plain = hybrid(init_policy(config_of(family), 0))
    added = policy.to_hf().keys() - plain.to_hf().keys()
    assert {name.split(".")[2] for name in added} == {"4", "5"} and not plain.to_hf().keys() - policy.to_hf().keys()
    layer = {name.removeprefix("model.layers.3.") for name in plain.to_hf() if name.startswith("model.layers.3.")}
    own = {f"{name}.weight" for name in NAMES}
    assert added == {f"model.layers.{number}.{name}" for number in (4, 5) for name in layer | own}
    assert all(
        policy.place_of(f"model.layers.5.{name}.weight") is None for name in ("embed_tokens", "shared_head.head")
    )
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path, heads=True)
    assert all(torch.equal(a, policy.named_weights()[n]) for n, a in again.named_weights().items())
    # Not asked for, they are kept aside, and what is written is the same.
    kept = load_policy(tmp_path)
    second = {name for names in policy.second_names().values() for name in names}
    assert not hybrid(kept).predictors and kept.kept.keys() == added | second
    save_policy(kept, tmp_path / "again")
    assert kept.kept["model.layers.5.embed_tokens.weight"].equal(policy.embed_tokens.weight)
    assert kept.kept["model.layers.4.shared_head.head.weight"].equal(policy.lm_head_weight)
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == HEADS


def test_a_new_policy_draws_its_heads_behind_the_others() -> None:
    """So that the trunk of a seed is the same with and without them."""
    config = config_of("deepseek_v3")
    plain, policy = init_policy(config, 3), init_policy(config, 3, heads=True)
    weights = policy.named_weights()
    assert all(torch.equal(w, weights[name]) for name, w in plain.named_weights().items())
    drawn_weights = [w for n, w in weights.items() if n.startswith("predictors.") and w.dim() > 1]
    assert drawn_weights and all(float(w.detach().std()) == pytest.approx(0.08, rel=0.2) for w in drawn_weights)


def test_the_released_head_has_its_published_size() -> None:
    """DeepSeek-V3's README_WEIGHTS: 11.5 B unique parameters of the MTP module, without embedding and LM head."""
    more = count_parameters(None, DEEPSEEK_V3, heads=True) - count_parameters(None, DEEPSEEK_V3)
    assert more == pytest.approx(11.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("deepseek_v3", heads=0), "num_nextn_predict_layers is 0 or missing"),
        (VARIANTS["mixtral"].hf_config, "num_nextn_predict_layers is 0 or missing"),
        ({**TINY["minimax_m2"].hf_config, **TINY["minimax_m2"].kept_config}, "num_nextn_predict_layers"),
        (TINY["qwen3_next"].hf_config, "recurrent layers"),
        ({**TINY["ling"].hf_config, **TINY["ling"].kept_config}, "recurrent layers"),
        (QWEN3, "model_type 'qwen3' have none"),
    ],
    ids=["no heads", "mixtral", "minimax_m2", "qwen3_next", "ling", "dense"],
)
def test_a_policy_without_heads_is_refused_in_one_sentence(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=rf"^rollout\.engine_args\.speculative_config\.method mtp .*{reason}"):
        shape_of({"vocab_size": 64, **config}, heads=True)


def test_weights_without_the_heads_are_refused_before_a_run(tmp_path: Path) -> None:
    """As a folder that transformers wrote, which drops them."""
    tiny_hybrids.save("deepseek_v3", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("deepseek_v3")))
    check_weights(tmp_path)
    with pytest.raises(UserError, match=r"speculative_config\.method mtp .*heads are missing.*model\.layers\.4\.enorm"):
        check_weights(tmp_path, heads=True)


def test_a_recipe_asks_for_heads_by_the_method() -> None:
    assert asks_heads({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}})
    assert not asks_heads({"speculative_config": {"method": "ngram"}}) and not asks_heads({})
    assert not asks_heads({"speculative_config": None})
