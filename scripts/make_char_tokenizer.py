"""Makes recipes/tokenizers/chars: one token for each printable ASCII character, tab and newline.

    python scripts/make_char_tokenizer.py [FOLDER]
    python scripts/make_char_tokenizer.py --m2 [FOLDER]       recipes/tokenizers/m2_chars

<pad> 0, <bos> 1, <eos> 2, <unk> 3 for every other character, then the characters in the order of their codes. Nothing
is added around a text, and there is no chat template: a prompt is its characters.

With --m2 the marks of MiniMax-M2's format follow, a token each, and [e~[ ends a turn. Its chat template is M2's without
the line feeds inside of a turn and a default system message: a thought is shown until a user message follows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = ("\t", "\n", *map(chr, range(32, 127)))
FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "tokenizers" / "chars"

M2_MARKS = (
    "[e~[",
    "]~b]system",
    "]~b]user",
    "]~b]ai",
    "]~b]tool",
    "<think>",
    "</think>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    '<invoke name="get">',
    "</invoke>",
    '<parameter name="key">',
    "</parameter>",
    "<response>",
    "</response>",
)
M2_TEMPLATE = """
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools -%}
{{ ']~b]system\\n<tools>\\n' }}
{%- for tool in tools %}{{ '<tool>' + (tool.function | tojson) + '</tool>\\n' }}{% endfor -%}
{{ '</tools>[e~[\\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ ']~b]ai\\n' }}
{%- if m.reasoning_content and loop.index0 > ns.last_user -%}
{{ '<think>' + m.reasoning_content + '</think>' }}
{%- endif -%}
{{ m.content }}
{%- if m.tool_calls -%}
{{ '<minimax:tool_call>' }}
{%- for call in m.tool_calls -%}
{{ '<invoke name="' + call.function.name + '">' }}
{%- for key, value in call.function.arguments.items() -%}
{{ '<parameter name="' + key + '">' + (value if value is string else value | tojson) + '</parameter>' }}
{%- endfor -%}
{{ '</invoke>' }}
{%- endfor -%}
{{ '</minimax:tool_call>' }}
{%- endif -%}
{{ '[e~[\\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ ']~b]tool\\n' }}{% endif -%}
{{ '<response>' + m.content + '</response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '[e~[\\n' }}{% endif -%}
{%- else -%}
{{ ']~b]' + m.role + '\\n' + m.content + '[e~[\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ']~b]ai\\n<think>' }}{% endif -%}
"""


def make(folder: Path, marks: Sequence[str] = (), eos: str = "<eos>", template: str | None = None) -> None:
    """Writes the tokenizer. `marks` are further tokens, which decoding shows."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    # A byte-pair model without merges leaves every character by itself.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    fast.chat_template = template
    fast.save_pretrained(str(folder))


if __name__ == "__main__":
    named = [Path(argument) for argument in sys.argv[1:] if argument != "--m2"]
    if "--m2" in sys.argv:
        make(named[0] if named else FOLDER.with_name("m2_chars"), M2_MARKS, "[e~[", M2_TEMPLATE)
    else:
        make(named[0] if named else FOLDER)
