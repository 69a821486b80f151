"""`cispo export`: a checkpoint as a folder that transformers, peft and vLLM load, checked by reading it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.files import disk_errors
from cispo.output.checkpoint import check_checkpoint
from cispo.output.run_folder import no_run_above
from cispo.policies.adapter_files import AdapterFolder, adapter_in, copy_adapter, merged_policy
from cispo.policies.loading import load_policy, save_policy
from cispo.policies.policy import Policy
from cispo.rollout.prompts import warn
from cispo.rollout.renderer import Renderer, has_tokenizer, load_tokenizer


def export(checkpoint: Path, to: Path, dtype: str, *, merge: bool = False) -> None:
    """Writes a checkpoint's policy, or its adapter alone; `merge` writes an adapter and its policy as one policy."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r} is unknown; there are float32 and bfloat16")
    check_checkpoint(str(checkpoint))
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is a file")
    if to.exists() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty")
    found = adapter_in(checkpoint)
    if found is None and merge:
        raise UserError(f"--merge: {checkpoint} holds no adapter")
    renderer = Renderer(load_tokenizer(str(checkpoint))) if has_tokenizer(checkpoint) else None
    with no_run_above(to), disk_errors(to):
        if found is not None and not merge:
            size = _export_adapter(found, to, getattr(torch, dtype))
        else:
            size = _export_policy(checkpoint, found, to, getattr(torch, dtype))
        if renderer is not None:
            renderer.save(to)
    if renderer is None:
        warn(f"{checkpoint} holds no tokenizer, so {to} has none either, and nothing says where completions end")
    what = "an adapter of " if found is not None and not merge else ""
    print(f"{to}: {what}{size:,} parameters, {dtype}")


def _export_policy(checkpoint: Path, found: AdapterFolder | None, to: Path, dtype: torch.dtype) -> int:
    policy: Policy = load_policy(str(checkpoint), dtype=dtype) if found is None else merged_policy(found, dtype)
    save_policy(policy, to)
    return _checked(policy.to_hf(), load_policy(str(to), dtype=dtype).to_hf())


def _export_adapter(found: AdapterFolder, to: Path, dtype: torch.dtype) -> int:
    tensors = copy_adapter(found, to, dtype)
    again = adapter_in(to)
    assert again is not None
    return _checked(tensors, again.tensors())


def _checked(written: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> int:
    """The number of parameters, which are the same twice."""
    assert written.keys() == again.keys() and all(torch.equal(written[k], again[k]) for k in written)
    return sum(t.numel() for t in written.values())
