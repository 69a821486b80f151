"""Heads of multi-token prediction: the module, its names on disk, and their training beside the policy.

References: transformers' layers with the equations of arXiv 2412.19437, section 2.2, around them, a document at a time;
one document at a time in float64; the learner without heads, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from cispo.learner.adapters import Adapters
from cispo.learner.heads import HeadsLoss, Predictions, heads_loss, prediction_metrics
from cispo.learner.learner import Learner, UpdateResult
from cispo.learner.loss import attention_of, read
from cispo.learner.memory import heads_of, rank_memory, units_of
from cispo.ops.logprobs import best_tokens
from cispo.policies.costs import cache_sizes
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.loading import check_weights, count_parameters, init_policy, load_policy, save_policy, shape_of
from cispo.policies.moe import correction_biases
from cispo.policies.policy import Policy
from cispo.policies.replay import routers_of
from cispo.recipe.drafts import asks_heads
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.types import MicroBatch, Sample
from tests import tiny_hybrids
from tests.shard_group import prompts_shared
from tests.test_learner import CISPO, samples
from tests.test_released_configs import DEEPSEEK_V3
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


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    save_policy(drawn(config_of(request.param)), made)
    return made


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


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v32"])
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


# --- the learner -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases balanced, prompts shared": {"router_bias_rate": 0.01, "share_prompts": True},
    "8 bits, on the host, recomputed": {
        "optimizer": "adamw8bit",
        "offload": ["optimizer", "activations"],
        "gradient_checkpointing": True,
    },
}


def updates(
    folder: Path, options: dict[str, Any], *, heads: bool, dtype: Any = "float32", count: int = 3
) -> tuple[Learner, list[UpdateResult]]:
    learner = Learner(str(folder), LearnerConfig(**options), heads=heads, dtype=dtype, temperature=1.3)
    mbs = packed(prompts_shared(samples()), shared=bool(options.get("share_prompts")))
    assert len(mbs) > 1
    return learner, [learner.update(mbs, CISPO, lr=1e-2) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, "float32") for options in OPTIONS.values()), (OPTIONS["8 bits, on the host, recomputed"], "bfloat16")],
    ids=[*OPTIONS, "masters on the host"],
)
def test_the_policy_is_the_one_without_heads_to_the_bit(folder: Path, options: dict[str, Any], dtype: str) -> None:
    """Three updates: weights, moments, biases, losses, norms, log-probabilities. The heads learn meanwhile."""
    alone, expected = updates(folder, options, heads=False, dtype=dtype)
    learner, results = updates(folder, options, heads=True, dtype=dtype)
    assert [(r.batch.loss, r.grad_norm, r.taken) for r in results] == [
        (r.batch.loss, r.grad_norm, r.taken) for r in expected
    ]
    assert min(r.grad_norm for r in results) > 1, "nothing is clipped"
    for one, other in zip(results, expected, strict=True):
        assert one.batch.tokens is not None and other.batch.tokens is not None
        assert torch.equal(one.batch.tokens.logprobs, other.batch.tokens.logprobs)
    weights = learner.policy.named_weights()
    assert all(torch.equal(w, weights[name]) for name, w in alone.policy.named_weights().items())
    state, whole = alone.rank.optimizer.state(), learner.rank.optimizer.state()
    assert state.keys() == whole.keys() and all(torch.equal(value, whole[key]) for key, value in state.items())
    # What a reference and routers' biases are made of is the trunk's.
    learner.freeze_reference()
    assert learner.reference is not None and not heads_of(learner.reference)
    assert len(correction_biases(learner.policy)) == len(routers_of(learner.policy)) == 3
    losses = [found.loss / found.count for r in results if (found := r.batch.predictions)]
    assert losses[2] < losses[1] < losses[0] < 6 and expected[0].batch.predictions is None


def test_heads_have_a_norm_and_a_clip_of_their_own(folder: Path) -> None:
    """With a bound far below their gradient's norm their first moments are those of a gradient of that norm: 1e-6, the
    rounding of a float32 sum."""
    learner, _ = updates(folder, {"max_grad_norm": 1e-3}, heads=True, count=1)
    assert learner.rank.heads is not None
    for optimizer in learner.rank.optimizers:
        moments = [v for key, v in optimizer.state().items() if key.endswith("/exp_avg")]
        norm = torch.stack([m.double().square().sum() for m in moments]).sum().sqrt()
        assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-5)


def test_a_resumed_run_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    """To the bit; and a checkpoint with heads goes on without them, and the reverse."""
    learner, _ = updates(folder, {}, heads=True, count=2)
    (tmp_path / "training").mkdir()
    learner.start_save(str(tmp_path))
    assert learner.saved(wait=True)
    mbs = packed(prompts_shared(samples()))
    expected = learner.update(mbs, CISPO, lr=1e-2)
    resumed = Learner(str(tmp_path), LearnerConfig(), heads=True, temperature=1.3)
    resumed.restore(str(tmp_path))
    found = resumed.update(mbs, CISPO, lr=1e-2)
    assert (found.batch.predictions, found.grad_norm) == (expected.batch.predictions, expected.grad_norm)
    weights = learner.policy.named_weights()
    assert all(torch.equal(w, weights[name]) for name, w in resumed.policy.named_weights().items())
    without = Learner(str(tmp_path), LearnerConfig(), temperature=1.3)
    without.restore(str(tmp_path))
    assert without.update(mbs, CISPO, lr=1e-2).grad_norm == expected.grad_norm and without.policy.kept
    (tmp_path / "without" / "training").mkdir(parents=True)
    without.start_save(str(tmp_path / "without"))
    assert without.saved(wait=True)
    again = Learner(str(tmp_path / "without"), LearnerConfig(), heads=True, temperature=1.3)
    again.restore(str(tmp_path / "without"))
    assert again.update(mbs, CISPO, lr=1e-2).taken


def test_engines_and_folders_get_the_heads_weights(folder: Path, tmp_path: Path) -> None:
    learner, _ = updates(folder, {}, heads=True, count=1)
    names = {name for name, _ in learner.policy.disk_places()}
    assert any(name.startswith("model.layers.5.") for name in names)
    assert {slot.name for bucket in learner.sender.buckets for slot in bucket.slots} == names
    sent = load_file(learner.publish(str(tmp_path), 1))
    learner.save(str(tmp_path / "saved"))
    written = load_file(tmp_path / "saved" / "model.safetensors")
    second = {f"model.layers.{n}.{name}.weight" for n in (4, 5) for name in ("embed_tokens", "shared_head.head")}
    assert sent.keys() == names and written.keys() == names | second
    assert all(torch.equal(sent[name], written[name]) for name in names)
    assert torch.equal(written["model.layers.5.embed_tokens.weight"], sent["model.embed_tokens.weight"])
    assert torch.equal(written["model.layers.4.shared_head.head.weight"], sent["lm_head.weight"])


def test_beside_an_adapter_heads_stay_as_they_came(folder: Path) -> None:
    adapters = Adapters(lora=Lora(rank=2, alpha=4.0), seed=3)
    before = load_policy(folder, heads=True).named_weights()
    learner = Learner(str(folder), LearnerConfig(), adapters=adapters, heads=True)
    alone = Learner(str(folder), LearnerConfig(), adapters=adapters)
    results = [one.update(packed(samples()), CISPO, lr=1e-2) for one in (learner, alone)]
    assert results[0].grad_norm == results[1].grad_norm > 0 and results[0].batch.predictions is None
    weights = learner.policy.named_weights()
    heads = [name for name in weights if name.startswith("predictors.")]
    assert heads and all(torch.equal(weights[name], before[name]) for name in heads)
    assert not any(".lora_" in name for name in heads)
    sent = learner.policy.to_hf()
    assert torch.equal(sent["model.layers.4.eh_proj.weight"], before["predictors.0.eh_proj.weight"])
    one, other = (made.policy for made in (learner, alone))
    assert one.adapter_config.to_dict() == other.adapter_config.to_dict()  # type: ignore[attr-defined]


def test_the_metrics_are_means_over_predictions() -> None:
    ranks = [Predictions(count=3, loss=6.0, right=1), None, Predictions(count=1, loss=1.0, right=1)]
    assert prediction_metrics(ranks) == {"mtp/loss": 1.75, "mtp/accuracy": 0.5}
    assert prediction_metrics([None]) == prediction_metrics([Predictions(count=0, loss=0.0, right=0)]) == {}


def test_the_memory_plan_counts_heads_but_not_in_a_reference() -> None:
    plain, policy = (shape_of(config_of("deepseek_v3"), heads=heads) for heads in (False, True))
    more = sum(p.numel() for head in heads_of(policy) for p in head.parameters())
    options: dict[str, Any] = {"dtype": "float32", "sharded": False, "reference": True}
    with_heads, without = (rank_memory(one, LearnerConfig(), **options) for one in (policy, plain))
    assert with_heads.weights - without.weights == 4 * more and with_heads.reference == without.reference
    assert with_heads.moments - without.moments == 8 * more
    # A head is one layer more in an engine's cache, of four.
    assert cache_sizes(policy)[0] * 4 == cache_sizes(plain)[0] * (4 + HEADS)
    trunk = [len(unit) for unit in units_of(plain)]
    assert [len(unit) for unit in units_of(policy)] == trunk + [1] * 2 * HEADS
