"""The sampler is the learner: vLLM's log-probabilities against the policy's on the same tokens, in every scheduling
mode, before and after weight updates, for both dialects and for a dense Hugging Face model."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.engines.vllm_start import import_vllm
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.minimax.config import LightningConfig, dump_config, parse_config
from cispo.policies.policy import Policy
from cispo.policies.replay import routes_of
from cispo.types import Completion, RepetitionStop, RoutedExperts, Sampling
from cispo.weights.publish import publish_weights, weights_folder
from tests.served import sampled, update

ORACLE = Path(__file__).parents[2] / "shared/oracle/m1_like"

TOLERANCE = 1e-5
"""Largest difference of two float32 log-probabilities; each side is within 3e-6 of float64 on these policies."""

VOCAB = 64
# 1 to 300 tokens around the block size 128 and the chunk sizes; several are single tokens: with 12 sequences at a
# time they take over the cache slots of longer ones.
LENGTHS = (1, 300, 1, 64, 2, 63, 128, 65, 1, 129, 127, 256, 17, 1, 5, 200, 33, 1, 1, 90, 31, 257, 7, 1)
TOKENS = 85

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "rotary_dim": 32,
    "lightning_layers": (True, True, True, False),
    "num_experts": 4,
    "experts_per_token": 2,
    "initializer_range": 0.08,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

SAMPLING = Sampling(max_tokens=TOKENS, eos_ids=(), repetition=RepetitionStop(run_length=0))


def lightning(**changes: Any) -> dict[str, Any]:
    return dump_config(LightningConfig(**(TINY | changes)))


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


RAGGED = random_prompts(LENGTHS, seed=1)
# Two of three blocks shared, then between 1 and 15 tokens of their own.
SHARED = [random_prompts([280], seed=2)[0] + prompt[:15] for prompt in RAGGED[:12]]
# Each grows past a block boundary while it decodes.
CROSSING = random_prompts([100 + n for n in range(16)], seed=3)


def learner_logprobs(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
    """Of every sampled token, from one packed forward pass."""
    sequences = [[*p, *c.token_ids] for p, c in zip(prompts, completions, strict=True)]
    starts = list(accumulate((len(s) for s in sequences), initial=0))
    tokens = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    with torch.no_grad():
        hidden = policy(tokens, positions, torch.tensor(starts, dtype=torch.int32)).hidden
        logprobs = (hidden @ policy.lm_head_weight.T).log_softmax(-1)
    rows = [
        start + len(p) - 1 + i
        for start, p, c in zip(starts, prompts, completions, strict=False)
        for i in range(len(c.token_ids))
    ]
    sampled = torch.tensor([t for c in completions for t in c.token_ids])
    return logprobs[rows].gather(1, sampled[:, None]).squeeze(1)


def difference(engine: ServedEngine, policy: Policy, prompts: Sequence[Sequence[int]], seed: int = 0) -> float:
    """The largest difference over what the engine samples now; 0 tokens and NaN are failures."""
    completions = sampled(engine, prompts, SAMPLING, seed)
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.routed_experts is not None:
            assert_learners_experts(policy, [*prompt, *completion.token_ids], completion.routed_experts)
    engine_side = torch.tensor([x for c in completions for x in c.logprobs])
    learner_side = learner_logprobs(policy, prompts, completions)
    assert len(engine_side) == len(prompts) * TOKENS
    assert engine_side.isfinite().all() and learner_side.isfinite().all()
    return (engine_side - learner_side).abs().max().item()


def assert_learners_experts(policy: Policy, ids: Sequence[int], reported: RoutedExperts) -> None:
    """The experts of every token, those from the prefix cache too, up to the first that two experts nearly tie for."""
    tokens = torch.tensor(ids[:-1])
    with torch.no_grad():
        router = policy(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)).router
    expected = routes_of(router)
    found = torch.frombuffer(bytearray(reported.data), dtype=torch.uint8).view(reported.shape)
    assert found.shape == expected.shape and reported.first == 0
    wrong = (found != expected).any(-1).nonzero()
    if len(wrong):
        row, layer = wrong[0].tolist()
        best = router[layer].probs[row].sort(descending=True).values
        assert best.diff().abs().min() < 1e-5, f"token {row} has other experts in layer {layer}"


@contextmanager
def running(folder: Path, *, record_routes: bool = False, **engine_args: Any) -> Iterator[ServedEngine]:
    core = VLLMEngine(
        str(folder),
        dtype="float32",
        max_context=640,
        max_sequences=12,
        seed=0,
        engine_args=engine_args,
        record_routes=record_routes,
    )
    engine = ServedEngine(core)
    try:
        yield engine
    finally:
        engine.close()


def counting(owner: Any, method: str, amount: Callable[[Any], int]) -> list[int]:
    """Adds up what calls of `owner.method` return, through `amount`, in a list of one."""
    total, original = [0], getattr(owner, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        total[0] += amount(result)
        return result

    setattr(owner, method, counted)
    return total


def vllm(engine: ServedEngine) -> Any:
    assert isinstance(engine.engine, VLLMEngine)
    return engine.engine._engine


def scheduler(engine: ServedEngine) -> Any:
    return vllm(engine).engine_core.engine_core.scheduler


def model_parameters(engine: ServedEngine) -> dict[str, Tensor]:
    (parameters,) = vllm(engine).apply_model(lambda model: {n: p.clone() for n, p in model.named_parameters()})
    return parameters


@pytest.fixture(scope="module")
def weights() -> Iterator[Path]:
    with weights_folder("test") as folder:
        yield folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Policy]]:
    """A folder with the first of three versions of a policy, and the three."""
    folder = tmp_path_factory.mktemp("tiny")
    policies = [init_policy(lightning(), seed) for seed in range(3)]
    save_policy(policies[0], folder)
    return folder, policies


MODES: dict[str, tuple[dict[str, Any], list[list[int]], str]] = {
    "one_shot": ({"enable_chunked_prefill": False}, RAGGED, ""),
    "chunked": ({"max_num_batched_tokens": 64}, RAGGED, ""),
    "prefix_cache": ({"enable_prefix_caching": True}, SHARED + RAGGED[:12], "hits"),
    "preempted": ({"num_gpu_blocks_override": 26}, CROSSING + RAGGED[:8], "preemptions"),
    "prefix_cache_preempted": (
        {"enable_prefix_caching": True, "num_gpu_blocks_override": 20},
        SHARED + RAGGED[:12],
        "hits and preemptions",
    ),
}
APART = ("prefix_cache", "preempted", "prefix_cache_preempted")
"""Slow."""


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * (m in APART)) for m in MODES])
def test_engine_equals_learner(mode: str, tiny: tuple[Path, list[Policy]], weights: Path) -> None:
    engine_args, prompts, provoked = MODES[mode]
    folder, policies = tiny
    assert len(prompts) * TOKENS >= 2000
    with running(folder, record_routes=True, **engine_args) as engine:
        preemptions = counting(scheduler(engine), "_preempt_request", lambda _: 1)
        hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        assert difference(engine, policies[0], prompts) <= TOLERANCE
        for version in (1, 2):
            update(engine, str(publish_weights(policies[version].to_hf(), weights, version)), version)
            assert engine.version == version
        assert difference(engine, policies[2], prompts, seed=1) <= TOLERANCE
        # One token prompts alone, in the slots that longer sequences have left.
        assert difference(engine, policies[2], [[n] for n in range(8)], seed=2) <= TOLERANCE
    assert preemptions[0] >= 4 if "preemptions" in provoked else preemptions[0] == 0
    assert hits[0] >= 2000 if "hits" in provoked else hits[0] == 0


def test_an_updated_engine_is_the_engine_of_those_weights(
    tiny: tuple[Path, list[Policy]], weights: Path, tmp_path: Path
) -> None:
    folder, policies = tiny
    with running(folder) as engine:
        for version in (1, 2):
            update(engine, str(publish_weights(policies[version].to_hf(), weights, version)), version)
        updated, parameters = sampled(engine, RAGGED, SAMPLING, 7), model_parameters(engine)
    save_policy(policies[2], tmp_path)
    with running(tmp_path) as engine:
        fresh, expected = sampled(engine, RAGGED, SAMPLING, 7), model_parameters(engine)
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert [(c.token_ids, c.logprobs) for c in updated] == [(c.token_ids, c.logprobs) for c in fresh]
    assert {version for c in updated for version in c.versions} == {2}


@pytest.mark.parametrize("tied", [False, True])
def test_dense_policy_equals_learner_through_two_updates(tied: bool, weights: Path, tmp_path: Path) -> None:
    policies = [init_policy(QWEN3 | {"tie_word_embeddings": tied}, seed) for seed in range(3)]
    save_policy(policies[0], tmp_path)
    prompts = RAGGED[:12]
    with running(tmp_path) as engine:
        assert difference(engine, policies[0], prompts) <= TOLERANCE
        for version in (1, 2):
            update(engine, str(publish_weights(policies[version].to_hf(), weights, version)), version)
            assert difference(engine, policies[version], prompts) <= TOLERANCE


def test_a_model_of_vllms_transformers_backend_shares_a_process_with_the_learner(weights: Path, tmp_path: Path) -> None:
    """Both use transformers' class: neither a learner from before the engine nor one from after it may be changed."""
    config = QWEN3 | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "pad_token_id": 0}
    policies = [init_policy(config, seed) for seed in range(2)]
    save_policy(policies[0], tmp_path)
    with running(tmp_path) as engine:
        assert difference(engine, policies[0], RAGGED[:12]) <= TOLERANCE
        update(engine, str(publish_weights(policies[1].to_hf(), weights, 1)), 1)
        assert difference(engine, policies[1], RAGGED[:12]) <= TOLERANCE
        assert difference(engine, init_policy(config, 1), RAGGED[:12]) <= TOLERANCE


VARIANTS: dict[str, dict[str, Any]] = {
    # Heads that are no power of two, an ordinary residual, a shared expert, rotary on the whole head, unequal factors.
    "original": {
        "convention": "original",
        "num_heads": 6,
        "num_kv_heads": 2,
        "postnorm": False,
        "shared_size": 96,
        "linear_attn_alpha": 1.3,
        "linear_attn_beta": 0.7,
        "full_attn_alpha": 0.8,
        "full_attn_beta": 1.2,
        "mlp_alpha": 1.1,
        "mlp_beta": 0.6,
        "lightning_layers": (True, False, True),
    },
    # Sizes that torch's grouped product does not take, a tied head.
    "original_tied": {
        "convention": "original",
        "hidden_size": 66,
        "intermediate_size": 50,
        "rotary_dim": 8,
        "rope_theta": 500.0,
        "num_experts": 7,
        "experts_per_token": 3,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB + 5,
    },
    "hugging_face": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "linear_attn_alpha": 2.0,
        "mlp_beta": 0.5,
        "tie_word_embeddings": True,
        "lightning_layers": (False, True, True, False, True),
    },
}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "original")) for v in VARIANTS])
def test_conventions_equal_learner(variant: str, weights: Path, tmp_path: Path) -> None:
    first, second = (init_policy(lightning(**VARIANTS[variant]), seed) for seed in range(2))
    save_policy(first, tmp_path)
    with running(tmp_path) as engine:
        assert difference(engine, first, RAGGED[:12]) <= TOLERANCE
        update(engine, str(publish_weights(second.to_hf(), weights, 1)), 1)
        assert difference(engine, second, RAGGED[:12]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["original", "tied"])
def test_tensor_parallel_equals_learner(variant: str, weights: Path, tmp_path: Path) -> None:
    """Two ranks: heads, experts, the shared expert, the output norm and the vocabulary are cut, and updated whole."""
    changes = VARIANTS["original"] if variant == "original" else {"tie_word_embeddings": True, "num_kv_heads": 1}
    first, second = (init_policy(lightning(**changes), seed) for seed in range(2))
    save_policy(first, tmp_path)
    sizes: dict[str, Any] = {"max_context": 640, "max_sequences": 12, "tensor_parallel": 2}
    engine = ServedEngine(VLLMEngine(str(tmp_path), dtype="float32", seed=0, **sizes))
    try:
        assert difference(engine, first, RAGGED[:12]) <= TOLERANCE
        update(engine, str(publish_weights(second.to_hf(), weights, 1)), 1)
        assert difference(engine, second, RAGGED[:12]) <= TOLERANCE
    finally:
        engine.close()


def test_fused_expert_names_and_hugging_face_buffers_load(
    tiny: tuple[Path, list[Policy]], weights: Path, tmp_path: Path
) -> None:
    """The names of a transformers state dict: experts in one tensor, decay buffers beside the weights."""
    folder, policies = tiny
    fused = [_fuse(policy.to_hf()) for policy in policies]
    assert not any("block_sparse_moe" in name for name in fused[0])
    save_file(fused[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with running(tmp_path) as engine:
        assert difference(engine, policies[0], RAGGED[:8]) <= TOLERANCE
        update(engine, str(publish_weights(fused[1], weights, 1)), 1)
        assert difference(engine, policies[1], RAGGED[:8]) <= TOLERANCE


def _fuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    experts = {name for name in state if ".experts." in name}
    rest = state.keys() - experts
    fused = {name.replace(".block_sparse_moe.", ".mlp."): state[name].contiguous() for name in rest}
    for prefix in {name.split(".experts.")[0] for name in experts}:
        target = prefix.replace(".block_sparse_moe", ".mlp") + ".experts"
        each = {
            w: torch.stack([state[f"{prefix}.experts.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w2", "w3")
        }
        fused[f"{target}.gate_up_proj"] = torch.cat([each["w1"], each["w3"]], dim=1)
        fused[f"{target}.down_proj"] = each["w2"]
    fused["model.layers.0.self_attn.slope_rate"] = torch.full((4, 1, 1), 9.0)
    return fused


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference checkpoint of the original code is not here")
def test_engine_equals_the_original_code() -> None:
    """The folder as it is: original names, a model_type that neither vLLM nor transformers knows, a second safetensors
    file in it. Every row of log-probabilities, at every length."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    expected = load_file(ORACLE / "expected.safetensors")
    lengths = sorted(int(name.removeprefix("ids_")) for name in expected if name.startswith("ids_"))
    assert len(lengths) == 6
    with running(ORACLE, max_logprobs=-1) as engine:
        for length in lengths:
            ids = expected[f"ids_{length}"].flatten().tolist()
            params = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
            vllm(engine).add_request(str(length), tokens_input(ids), params)
        outputs: dict[int, Any] = {}
        while vllm(engine).has_unfinished_requests():
            outputs |= {int(o.request_id): o for o in vllm(engine).step() if o.finished}
    for length in lengths:
        rows = [*outputs[length].prompt_logprobs[1:], outputs[length].outputs[0].logprobs[0]]
        ours = torch.tensor([[row[token].logprob for token in range(96)] for row in rows])
        theirs = expected[f"logprobs_{length}"].view(length, 96)
        assert ours.shape == theirs.shape and ours.isfinite().all()
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_vllm_searches_modules_that_answer_any_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """As llvmlite's library does, whose `__dict__` is a function: numba of a reward in the same process loads it."""

    class Library:
        def __getattribute__(self, name: str) -> object:
            return print

    module, kernel = ModuleType("with_a_library"), object()
    module.library, module.kernel = Library(), kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    import_vllm(exact=True)
    from vllm.triton_utils import dispatcher

    dispatcher._rebind_kernels([(kernel, other := object())])  # type: ignore[arg-type, list-item]
    assert module.kernel is other  # type: ignore[attr-defined]


def test_original_model_types_are_known(tmp_path: Path) -> None:
    """Each spelling reaches the plugin through the public registries; vLLM counts the softmax layers rightly."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.config import ModelConfig, ParallelConfig

    from cispo.policies.families import FAMILIES
    from cispo.policies.vllm_plugin import register

    register()
    register()
    ours = FAMILIES["minimax"].vllm
    assert ours is not None and set(ours.architectures) <= set(ModelRegistry.get_supported_archs())
    config = lightning(convention="original", lightning_layers=(True, True, False, True, False))
    config["auto_map"] = {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"}  # not run, not asked about
    for model_type in ours.configs:
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        # Pickled as on its way to an engine in a process of its own.
        loaded = pickle.loads(pickle.dumps(AutoConfig.from_pretrained(tmp_path)))
        assert parse_config(loaded.to_dict()) == parse_config(config)
        model = ModelConfig(model=str(tmp_path), dtype="float32", skip_tokenizer_init=True)
        assert model.is_hybrid
        assert model.get_num_layers_by_block_type(ParallelConfig(), "attention") == 2


def test_policies_load_what_they_save(tiny: tuple[Path, list[Policy]]) -> None:
    """The parity above compares with the policy in memory: the folder holds the same one."""
    folder, policies = tiny
    loaded = load_policy(folder).to_hf()
    assert all(torch.equal(weight, loaded[name]) for name, weight in policies[0].to_hf().items())
