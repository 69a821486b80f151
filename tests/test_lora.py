"""Low-rank adapters: exact against merged weights, gradients by hand, frozen bases, every way out of the learner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from cispo.batch.packing import pack
from cispo.commands.export import export
from cispo.commands.train import train
from cispo.errors import UserError
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.output.folder import read_metrics
from cispo.policies.adapter_files import adapter_in, merged_policy
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.lora import AdaptedPolicy, adapt, adapted_layers
from cispo.policies.policy import Policy
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.start import merged_folder
from cispo.weights.buckets import WeightReceiver
from cispo.weights.publish import mapped_weights
from tests.lora_ranks import ADAPTERS, run_rank, with_values
from tests.rank_group import free_address
from tests.test_learner import CISPO, TINY, packed, samples
from tests.tiny_hybrids import TINY as HYBRIDS
from tests.tiny_policies import LLAMA, MINIMAX, ORIGINAL, QWEN3, bounds, tokens_of

LENGTHS = [5, 21, 14]
LEARNER = LearnerConfig(lr=1e-2)
POLICIES = {
    "minimax": MINIMAX,
    "minimax tied": {**MINIMAX, "tie_word_embeddings": True},
    "original, shared experts": {**ORIGINAL, "shared_intermediate_size": 12, "initializer_range": 0.08},
    "qwen3 tied": QWEN3,
    "llama": LLAMA,
    "qwen2, biases": {**LLAMA, "model_type": "qwen2"},
    **{name: tiny.hf_config for name, tiny in HYBRIDS.items()},
}


def adapted(config: Mapping[str, Any], dtype: torch.dtype = torch.float64, lora: Lora = ADAPTERS.lora) -> AdaptedPolicy:
    policy = adapt(init_policy(config, seed=0, dtype=dtype), lora)
    policy.load_adapter(policy.new_adapter(4))
    return policy


def shake(policy: AdaptedPolicy, seed: int = 0, std: float = 0.1) -> None:
    """An adapter with a visible effect in every layer."""
    generator = torch.Generator().manual_seed(seed)
    policy.load_adapter({n: torch.randn(w.shape, generator=generator) * std for n, w in policy.adapter().items()})


def logprobs(policy: Policy) -> Tensor:
    """[T, V] of ragged packed documents."""
    tokens = tokens_of(sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = policy(tokens, positions, bounds(LENGTHS)).hidden
    return F.linear(hidden, policy.lm_head_weight).log_softmax(-1)


def weighted(values: Tensor) -> Tensor:
    """Their sum with random weights of both signs."""
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))).sum()


def plain(config: Mapping[str, Any], policy: AdaptedPolicy) -> Policy:
    """A policy without adapter that got the adapted one's weights, as an engine does."""
    other = init_policy(config, seed=7, dtype=policy.lm_head_weight.dtype)
    other.load_hf(policy.to_hf().items())
    return other


def bytes_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", POLICIES)
def test_merged_weights_compute_the_same_as_the_adapter(name: str):
    """Two orders of the same sums: 1e-12 in float64, in float32 1e-5 or twice its own error in deep recurrences.

    Gradients reach every A and B of every family.
    """
    config = POLICIES[name]
    exact = compared(config, torch.float64)
    assert float((exact[0] - exact[1]).abs().max()) <= 1e-12
    adapter, merged = compared(config, torch.float32)
    error = max(float((each - exact[1]).abs().max()) for each in (adapter, merged))
    assert error <= 1e-4 and float((adapter - merged).abs().max()) <= max(1e-5, 2 * error)
    policy = adapted(config)
    shake(policy)
    weighted(logprobs(policy)).backward()
    for key, weight in policy.adapter().items():
        assert weight.grad is not None and bool(weight.grad.any()), key
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@torch.no_grad()
def compared(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities with a visible adapter, and of a policy with the merged weights."""
    base, policy = init_policy(config, seed=0, dtype=dtype), adapted(config, dtype)
    # A new adapter changes nothing, and no name on disk.
    assert torch.equal(logprobs(policy), logprobs(base)) and list(policy.to_hf()) == list(base.to_hf())
    shake(policy)
    assert float((logprobs(policy) - logprobs(base)).abs().max()) > 1e-2
    return logprobs(policy), logprobs(plain(config, policy))


@pytest.mark.parametrize("name", ["minimax", "qwen3 tied", "deepseek_v32"])
def test_gradients_are_those_of_the_merged_matrix(name: str):
    """dB = s dW A^T and dA = s B^T dW, with dW from a policy that has W + s B A as its weight."""
    config = POLICIES[name]
    policy = adapted(config)
    shake(policy)
    dense = plain(config, policy)
    for each in (policy, dense):
        weighted(logprobs(each)).backward()
    gradients = {key: weight.grad for key, weight in policy.adapter().items()}
    policy.zero_grad()
    policy.gradient_checkpointing = True
    weighted(logprobs(policy.train())).backward()
    assert_equal({key: weight.grad for key, weight in policy.adapter().items()}, gradients)  # type: ignore[arg-type]
    places, parameters, adapter = dict(dense.disk_places()), dict(dense.named_parameters()), policy.adapter()
    scale = ADAPTERS.lora.alpha / ADAPTERS.lora.rank
    for name in {key.partition(".lora_")[0] for key in adapter}:
        a, b = (adapter[f"{name}.lora_{letter}.weight"] for letter in "AB")
        grad = parameters[places[f"{name.removeprefix('base_model.model.')}.weight"].parameter].grad
        assert grad is not None and a.grad is not None and b.grad is not None
        for own, expected in ((b.grad, scale * grad @ a.T), (a.grad, scale * b.T @ grad)):
            largest = float(expected.detach().abs().max())
            assert largest > 1e-6 and float((own - expected).detach().abs().max()) <= 1e-11 * max(largest, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lightning hybrid whose norms are not neutral."""
    folder = tmp_path_factory.mktemp("policy")
    policy = init_policy({**TINY, "tie_word_embeddings": False}, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    save_policy(policy, folder)
    return folder


def learner_of(folder: Path, **keys: Any) -> Learner:
    return Learner(str(folder), LEARNER, adapters=ADAPTERS, **keys)


def adapter_of(learner: Learner) -> dict[str, Tensor]:
    assert isinstance(learner.policy, AdaptedPolicy)
    return bytes_of(learner.policy.adapter())


def update(learner: Learner, times: int) -> None:
    for _ in range(times):
        assert learner.update(packed(samples()), CISPO, lr=1e-2).taken


def test_training_changes_the_adapter_alone_and_the_reference_is_the_base(folder: Path):
    learner, whole = learner_of(folder), Learner(str(folder), LEARNER)
    mbs = packed(samples())
    before = bytes_of(whole.policy.to_hf())
    learner.freeze_reference()
    update(learner, 3)
    assert not any(p.requires_grad for n, p in learner.policy.named_parameters() if "lora_" not in n)
    for (_, place), value in zip(learner.policy.disk_places(), before.values(), strict=True):
        assert torch.equal(place.of(learner.policy.get_parameter(place.parameter)), value)
    assert all("lora_" in name for name in learner.rank.optimizer.names)
    assert all("lora_" in key for key in learner.rank.optimizer.state())
    assert learner.reference is None, "the reference is no second policy"
    for own, expected in zip(learner.logprobs(mbs, reference=True), whole.logprobs(mbs), strict=True):
        assert torch.equal(own, expected)
    moved = torch.cat(learner.logprobs(mbs)) - torch.cat(whole.logprobs(mbs))
    assert float(moved.abs().max()) > 1e-3, "the adapter is on again"


def test_a_reference_after_a_warm_up_keeps_its_adapter(folder: Path, tmp_path: Path):
    learner = learner_of(folder)
    mbs = packed(samples())
    update(learner, 2)
    start, kept = learner.logprobs(mbs), adapter_of(learner)
    learner.freeze_reference()
    learner.save(str(tmp_path / "reference"))
    update(learner, 1)
    now = learner.logprobs(mbs)
    again = learner_of(folder)
    again.load_reference(str(tmp_path / "reference"))
    for each in (learner, again):
        for own, expected in zip(each.logprobs(mbs, reference=True), start, strict=True):
            assert torch.equal(own, expected)
    for own, expected in zip(learner.logprobs(mbs), now, strict=True):
        assert torch.equal(own, expected)
    assert any(not torch.equal(kept[name], value) for name, value in adapter_of(learner).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_adapter_is_the_undisturbed_one_bit_for_bit(folder: Path, tmp_path: Path, dtype: Any):
    straight = learner_of(folder, dtype=dtype)
    update(straight, 4)
    first = learner_of(folder, dtype=dtype)
    update(first, 2)
    first.start_save(str(tmp_path))
    update(first, 1)  # while the files are written
    assert first.saved(wait=True)
    second = learner_of(tmp_path, dtype=dtype)
    second.restore(str(tmp_path))
    update(second, 2)
    assert_equal(adapter_of(second), adapter_of(straight))
    assert_equal(second.rank.optimizer.state(), straight.rank.optimizer.state())
    names = {file.name for file in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "base.json", "config.json"} <= names
    assert "model.safetensors" not in names
    found = adapter_in(tmp_path)
    assert found is not None and found.check_base() == folder
    other = json.loads((tmp_path / "base.json").read_text())
    other["sha256"]["model.safetensors"] = "0" * 64
    (tmp_path / "base.json").write_text(json.dumps(other))
    wrong = adapter_in(tmp_path)
    assert wrong is not None
    with pytest.raises(UserError, match="is not the file that the adapter"):
        merged_policy(wrong)


def test_engines_receive_merged_weights(folder: Path, tmp_path: Path):
    """By a published file and by buckets with checksums: W + s B A in the adapted matrices, the base elsewhere."""
    learner, base = learner_of(folder), load_policy(folder).to_hf()
    learner.export.bucket_bytes = 1 << 14
    for _ in range(2):  # the second time what is sent has changed
        update(learner, 1)
        adapter = adapter_of(learner)
        expected = dict(base)
        for name in {key.partition(".lora_")[0] for key in adapter}:
            weight = f"{name.removeprefix('base_model.model.')}.weight"
            a, b = (adapter[f"{name}.lora_{letter}.weight"] for letter in "AB")
            expected[weight] = torch.addmm(base[weight], b, a, alpha=ADAPTERS.lora.alpha / ADAPTERS.lora.rank)
            assert float((expected[weight] - base[weight]).abs().max()) > 1e-4
        assert_equal(dict(mapped_weights(learner.publish(str(tmp_path), 1))), expected)
        receiver, received = WeightReceiver(torch.device("cpu")), {}
        assert learner.num_buckets() > 3
        for number in range(learner.num_buckets()):
            received |= bytes_of(dict(receiver.receive(learner.stage_bucket(number, "direct", check=True))))
        assert_equal(received, expected)
        found = learner.save(str(tmp_path / "saved")) or adapter_in(tmp_path / "saved")
        assert found is not None
        assert_equal(merged_policy(found).to_hf(), expected)


def update_critic(critic: Critic, times: int) -> None:
    for _ in range(times):
        mbs = packed(samples())
        assert critic.update(with_values(mbs, critic.values(mbs)), lr=1e-2).taken


def test_a_critic_trains_its_head_and_an_adapter(folder: Path, tmp_path: Path):
    """Starts from the learner's adapter, resumes bit for bit, writes no frozen weight."""
    learner = learner_of(folder)
    update(learner, 1)
    published = learner.publish(str(tmp_path), 1)

    def critic() -> Critic:
        return Critic(str(folder), CriticConfig(), LEARNER, adapters=ADAPTERS)

    straight, first = critic(), critic()
    for each in (straight, first):
        each.load_backbone(published)
        assert isinstance(each.model.backbone, AdaptedPolicy)
        assert_equal(bytes_of(each.model.backbone.adapter()), adapter_of(learner))
    frozen = bytes_of({n: p for n, p in straight.model.named_parameters() if not p.requires_grad})
    update_critic(straight, 4)
    update_critic(first, 2)
    (tmp_path / "saved").mkdir()
    first.start_save(str(tmp_path / "saved"))
    assert first.saved(wait=True)
    second = critic()
    second.restore(str(tmp_path / "saved"))
    update_critic(second, 2)
    state = load_file(tmp_path / "saved" / "training" / "critic.safetensors")
    assert state and all("lora_" in key or "head." in key for key in state)
    assert_equal(bytes_of(dict(second.model.named_parameters())), bytes_of(dict(straight.model.named_parameters())))
    assert_equal(bytes_of({n: p for n, p in straight.model.named_parameters() if not p.requires_grad}), frozen)
    assert bool(straight.model.head.weight.detach().any())
    assert all(bool(w.detach().any()) for w in straight.model.backbone.adapter().values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "target", "sentence"),
    [
        (MINIMAX, "experts", "names stacked experts, which stay frozen"),
        (MINIMAX, "gate_up_proj", "names stacked experts, which stay frozen"),
        (MINIMAX, "w1", "names stacked experts, which stay frozen"),
        (MINIMAX, "lm_head", "is the output head or the embedding"),
        (QWEN3, "embed_tokens", "is the output head or the embedding"),
        (MINIMAX, "gate", "is no linear layer"),
        (MINIMAX, "self_attn", "is no linear layer"),
        (MINIMAX, "q_prj", "names nothing in this policy; its linear layers are k_proj, o_proj, out_proj"),
        (POLICIES["original, shared experts"], "coefficient", "is read as a matrix"),
        (POLICIES["deepseek_v32"], "indexer.wq_b", "has no gradient"),
    ],
)
def test_a_target_that_takes_no_adapter_is_one_sentence(config: dict[str, Any], target: str, sentence: str):
    policy = init_policy(config, seed=0)
    with pytest.raises(UserError, match=f"policy.lora.targets: '{target}' {sentence}"):
        adapted_layers(policy, Lora(targets=["self_attn.o_proj", target]))


def test_targets_are_ends_of_names():
    policy = init_policy(MINIMAX, seed=0)
    assert [*adapted_layers(policy, Lora(targets=["q_proj", "layers.2.self_attn.qkv_proj"])).values()] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.qkv_proj",
    ]
    one = adapt(policy, Lora(targets=["layers.2.self_attn.qkv_proj"]))
    # The short name would be that of other layers as well.
    assert one.adapter_config.target_modules == ["model.layers.2.self_attn.qkv_proj"]
    assert sum(parameter.requires_grad for parameter in one.parameters()) == 2


def test_sharded_ranks_train_and_send_the_same_adapter(folder: Path, tmp_path: Path):
    """Two ranks with halves of every parameter against one; engines' weights are equal in bits to the checkpoint's.

    One rank resumes the checkpoint of two.
    """
    (tmp_path / "published").mkdir()
    batches = pack(samples(), reduction="token", max_tokens=16, tokens_per_micro_batch=60, ranks=2)
    arguments = (str(folder), batches, (free_address(), free_address()), str(tmp_path), "float32")
    mp.spawn(run_rank, args=arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    one = learner_of(folder)
    update(one, 2)
    found = adapter_in(tmp_path)
    assert found is not None
    assert_close(found.tensors(), adapter_of(one))
    merged = dict(merged_policy(found).to_hf())
    for name in ("sent-0", "received-0", "received-1"):
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), merged)
    resumed = learner_of(tmp_path)
    resumed.restore(str(tmp_path))
    update(resumed, 1)
    assert_close(adapter_of(resumed), load_file(tmp_path / "after.safetensors"))
    critic = Critic(str(folder), CriticConfig(), LEARNER, adapters=ADAPTERS)
    critic.load_backbone(one.publish(str(tmp_path), 1))
    update_critic(critic, 2)
    assert isinstance(critic.model.backbone, AdaptedPolicy)
    assert_close(bytes_of(critic.model.backbone.adapter()), load_file(tmp_path / "critic.safetensors"))


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Where a gradient is 0 but for rounding, Adam makes its sign a step: such entries are few."""
    assert a.keys() == b.keys()
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert bool(differences.isfinite().all()) and float((differences > 1e-5).double().mean()) < 1e-3


@pytest.mark.parametrize("config", [QWEN3, MINIMAX], ids=["qwen3", "minimax"])
def test_exports_load_in_transformers_and_peft(config: dict[str, Any], tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, saved, alone, merged = (tmp_path / name for name in ("base", "saved", "alone", "merged"))
    save_policy(init_policy(config, seed=0), base)
    learner = learner_of(base)
    assert isinstance(learner.policy, AdaptedPolicy)
    shake(learner.policy)
    learner.save(str(saved))
    with pytest.raises(UserError, match="holds an adapter alone: cispo export --merge"):
        load_policy(saved)
    export(saved, alone, "float32")
    export(saved, merged, "float32", merge=True)
    with pytest.raises(UserError, match="--merge: .* holds no adapter"):
        export(merged, tmp_path / "again", "float32", merge=True)
    tokens = tokens_of(23)
    hidden = learner.policy(tokens, torch.arange(23), bounds([23])).hidden
    expected = F.linear(hidden, learner.policy.lm_head_weight).log_softmax(-1).detach()
    whole = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), str(alone)
    )
    for model in (whole, adapted):
        got = model(input_ids=tokens[None], use_cache=False).logits[0].detach().log_softmax(-1)
        assert float((got - expected).abs().max()) <= 1e-5
    with adapted.disable_adapter():
        without = adapted(input_ids=tokens[None], use_cache=False).logits[0].detach().log_softmax(-1)
    assert float((without - expected).abs().max()) > 1e-2


RECIPE: dict[str, Any] = {
    "runtime": "local",
    "policy": {
        "tokenizer": str(Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"),
        "lora": {"rank": 4, "alpha": 8},
        "config": {
            **TINY,
            "vocab_size": 128,
            "num_hidden_layers": 2,
            "num_local_experts": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    },
    "data": {"source": "rewards.sorting:problems", "args": {"size": 512, "seed": 2, "count": 2}},
    "eval": {"source": "rewards.sorting:problems", "split": "test", "args": {"size": 4, "seed": 3, "count": 2}},
    "reward": {"functions": [{"fn": "tests.varied_reward:digits"}]},
    "rollout": {
        "engine": "torch",
        "prompts_per_step": 8,
        "group_size": 8,
        "max_context": 32,
        "max_tokens": 6,
        "repetition": {"run_length": 0},
    },
    "algorithm": {"name": "cispo", "ratio_max": 5.0, "kl": "k3", "kl_coef": 0.001, "kl_in": "loss"},
    "learner": {"lr": 2e-2, "tokens_per_micro_batch": 2048},
    "train": {"steps": 14, "save_every": 7, "eval_every": 0},
}


def recipe_in(folder: Path, **sections: object) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "lora", **RECIPE, **sections}))
    return folder / "recipe.yaml"


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Metrics of a run but for its times and the evaluation at its last step."""
    left_out = ("time/", "total/seconds", "rollout/tokens", "eval/")
    return [
        {key: value for key, value in row.items() if not key.startswith(left_out)}
        for row in read_metrics(folder / "runs" / "lora" / "metrics.jsonl")
    ]


def test_a_run_with_an_adapter_learns_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = {name: tmp_path / name for name in ("straight", "resumed")}
    for name, folder in runs.items():
        recipe = recipe_in(folder)
        monkeypatch.chdir(folder)
        if name == "resumed":
            train(recipe, ["train.steps=7"], resume=False)
            folder.rename(tmp_path / "moved")  # the base lies beside the checkpoint, wherever that is
            runs[name] = folder = tmp_path / "moved"
            monkeypatch.chdir(folder)
        train(folder / "recipe.yaml", [], resume=name == "resumed")
    rows = rows_of(runs["straight"])
    assert rows == rows_of(runs["resumed"]) and len(rows) == 15
    assert max(row["mismatch/logprob_max"] for row in rows[1:]) <= 1e-5, "engine and learner agree"
    rewards = [row["reward/mean"] for row in rows[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    last = [folder / "runs" / "lora" / "checkpoints" / "step_000014" for folder in runs.values()]
    assert_equal(*(load_file(folder / "adapter_model.safetensors") for folder in last))
    assert_equal(*(load_file(folder / "training" / "learner.safetensors") for folder in last))
    assert not (last[0] / "model.safetensors").exists()
    found = adapter_in(last[1])
    assert found is not None and found.base_folder() == last[1].parent / "initial"
    with merged_folder(str(last[0]), "float32") as merged:
        assert_equal(dict(load_policy(merged).to_hf()), dict(merged_policy(found).to_hf()))
    # A further run goes on from the adapter, another policy.lora or none does not.
    policy = {**RECIPE["policy"], "config": None, "model": str(last[0])}
    recipe = recipe_in(tmp_path / "further", policy=policy, train={"steps": 1, "save_every": 0, "eval_every": 0})
    monkeypatch.chdir(tmp_path / "further")
    train(recipe, [], resume=False)
    row = rows_of(tmp_path / "further")[1]
    assert row["reward/mean"] > rewards[0] and row["kl/reference"] <= 1e-9
    for key, sentence in (("policy.lora.rank=5", "policy.lora has rank 5"), ("policy.lora=null", "holds an adapter")):
        with pytest.raises(UserError, match=sentence):
            train(recipe, [key], resume=False)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("policy.lora.rank=0", "policy.lora.rank = 0: input should be greater than 0"),
        ("policy.lora.alpha=0", "policy.lora.alpha = 0: input should be greater than 0"),
        ("policy.lora.alpha=-1", "policy.lora.alpha = -1: input should be greater than 0"),
        ("policy.lora.targets=[]", "policy.lora.targets = "),
        ("policy.lora.targets=[experts]", "policy.lora.targets: 'experts' names stacked experts, which stay frozen"),
        ("policy.lora.targets=[q_prj]", "policy.lora.targets: 'q_prj' names nothing in this policy"),
        ("policy.lora.dropout=0.1", "policy.lora.dropout"),
    ],
)
def test_bad_values_are_one_sentence_before_anything_is_written(tmp_path: Path, key: str, sentence: str):
    recipe = recipe_in(tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(recipe, [key, f"output_dir={tmp_path}/runs"], resume=False)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
