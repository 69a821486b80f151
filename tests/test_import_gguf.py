"""scripts/import_gguf.py on a small file made here. Skipped where gguf, no dependency of ours, is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.policies.loading import load_policy
from cispo.rollout.renderer import Renderer, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "import_gguf.py"
TOKENS = ["<|endoftext|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "\u0120", "ab"]
WIDTH, INNER = 32, 64


def small_file(gguf: Any, file: Path) -> None:
    """A Llama of one layer with random float32 weights and a tokenizer of single characters."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_policy(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("import_gguf", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    small_file(gguf, tmp_path / "small.gguf")
    parameters = script.convert(tmp_path / "small.gguf", tmp_path / "policy", "float32")
    policy = load_policy(str(tmp_path / "policy"))
    weights = policy.to_hf()
    assert sum(w.numel() for w in weights.values()) == parameters
    expected = torch.randn((len(TOKENS), WIDTH), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights["model.embed_tokens.weight"], expected)
    renderer = Renderer(load_tokenizer(str(tmp_path / "policy")))
    assert renderer.eos_ids[0] == 1
    assert renderer.decode(renderer.render([{"role": "user", "content": "2 + 1"}])) == "2 + 1"
