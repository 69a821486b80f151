"""Turns a GGUF file into a model folder (config.json, safetensors, tokenizer) that a recipe's policy.model takes.

    python scripts/import_gguf.py FILE.gguf FOLDER [float32|bfloat16]

Needs `pip install --no-deps gguf`. The weights are what the file's quantisation left of them: a policy from a 4-bit
file is a little worse than the original, and no smaller.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(file: Path, folder: Path, dtype: str = "bfloat16") -> int:
    """Writes the folder and returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, so one that did not takes its weights.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["float32"], ["bfloat16"]):
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    print(f"{target}: {convert(source, target, *sys.argv[3:]):,} parameters")
