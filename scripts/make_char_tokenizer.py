"""Makes recipes/tokenizers/chars: one token for each printable ASCII character, tab and newline.

    python scripts/make_char_tokenizer.py [FOLDER]

<pad> 0, <bos> 1, <eos> 2, <unk> 3 for every other character, then the characters in the order of their codes. Nothing
is added around a text, and there is no chat template: a prompt is its characters.
"""

from __future__ import annotations

import sys
from pathlib import Path

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = ("\t", "\n", *map(chr, range(32, 127)))
FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "tokenizers" / "chars"


def make(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    # A byte-pair model without merges leaves every character by itself.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    fast.save_pretrained(str(folder))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
