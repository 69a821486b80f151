#!/usr/bin/env python
"""Every causal language model type of transformers, tiny, as a policy: which run, and how exactly.

    scripts/survey_models.py                 a Markdown table (docs/families.md)
    scripts/survey_models.py gemma3_text     one type

A type runs where its packed documents have the log-probabilities of transformers' own model, one document at a time.
Weights are random with norm weights and biases off neutral. The other types are listed with the sentence that refuses
them. Each type has `SECONDS` seconds in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from cispo.errors import UserError
from cispo.policies.families import family_of

SECONDS = 120
MOST_PARAMETERS = 20_000_000
LENGTHS = (7, 1, 12, 30)
TINY = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "ffn_dim": 64,
    "word_embed_proj_dim": 48, "embedding_size": 48, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 48, "n_layer": 2, "n_head": 4, "d_model": 48, "num_heads": 4, "n_heads": 4, "n_layers": 2,
    "num_layers": 2, "rotary_dim": 8, "n_inner": 64, "n_positions": 512, "max_seq_len": 512,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 40,
    "query_pre_attn_scalar": 16, "global_head_dim": 16, "num_kv_shared_layers": 0,
    "logits_scaling": 2.0, "dim_model_base": 24,  # the default sizes' would be 1, and far from 1
}  # fmt: skip


def tiny_config(kind: str) -> dict[str, Any]:
    """The type's default config with the sizes of `TINY` where it has such a key."""
    default = CONFIG_MAPPING[kind]()
    own = {*default.to_dict(), *default.attribute_map}
    sizes = {key: value for key, value in TINY.items() if key in own}
    if "kv_lora_rank" in own:  # latent attention: as many key heads as heads; head_dim is the rotated part's
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"], "head_dim": sizes["qk_rope_head_dim"]}
    made = AutoConfig.for_model(kind, **sizes).to_dict()
    layers = default.to_dict().get("layer_types")
    if layers:  # one layer of each kind, in the order of their first appearance
        kinds = list(dict.fromkeys(layers))
        sizes |= {"layer_types": kinds * max(1, -(-2 // len(kinds)))}
        sizes |= {"num_hidden_layers": len(sizes["layer_types"])}  # type: ignore[arg-type]
        made = AutoConfig.for_model(kind, **sizes).to_dict()
    return {**made, "model_type": kind}


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def survey(kind: str) -> Mapping[str, object]:
    """{"error": largest difference in log-probability} or {"refused": sentence}."""
    torch.manual_seed(0)
    try:
        raw = tiny_config(kind)
        config = AutoConfig.for_model(**raw)
    except Exception as error:  # noqa: BLE001  transformers' config classes raise anything
        return {"skipped": f"transformers makes no tiny config: {type(error).__name__}: {error}"[:200]}
    try:
        with torch.device("meta"):
            family_of(raw).build(raw, None, torch.float32)
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        return {"skipped": f"its config makes no tiny model: {size:,} parameters"}
    try:
        stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        perturb(stock)
        policy = family_of(raw).build(raw, None, torch.float32)
        policy.load_hf(stock.state_dict().items())
        documents = [torch.randint(3, 40, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        with torch.no_grad():
            expected = torch.cat([logprobs_of(stock(d[None], use_cache=False).logits[0]) for d in documents])
            tokens, positions = torch.cat(documents), torch.cat([torch.arange(n) for n in LENGTHS])
            bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
            hidden = policy(tokens, positions, bounds).hidden
            ours = logprobs_of(hidden @ policy.lm_head_weight.T)
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001  a type of transformers that does not run as it stands
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {"error": float((ours - expected).abs().max())}


def logprobs_of(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="model types; all of transformers when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})
    kinds = arguments.kinds or known
    if len(kinds) == 1:
        print(json.dumps(survey(kinds[0])))
        return
    results = {kind: in_process(kind) for kind in kinds}
    runs = {kind: result["error"] for kind, result in results.items() if "error" in result}
    print(f"{len(results)} types, {len(runs)} run, {sum('refused' in r for r in results.values())} are refused\n")
    print("| type | largest difference in log-probability |\n|---|---|")
    for kind, error in sorted(runs.items()):
        print(f"| {kind} | {error:.1e} |")
    print()
    for kind, result in sorted(results.items()):
        if kind not in runs:
            word, sentence = next(iter(result.items()))
            print(f"{kind}: {word}: {sentence}")


def _answer(kind: str, out: Connection) -> None:
    # Configs whose sizes have other names stay as large as the type's default: MemoryError instead of a full machine.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    out.send(survey(kind))


def in_process(kind: str) -> Mapping[str, object]:
    """`survey` in a fork: a type that hangs or aborts ends alone."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(kind, theirs))
    child.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(SECONDS) else {"failed": f"no answer in {SECONDS} s"}
    except EOFError:
        answer = {"failed": "its process ended"}
    child.kill()
    child.join()
    return answer


if __name__ == "__main__":
    main()
