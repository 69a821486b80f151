"""Drafts as engine arguments: `rollout.engine_args.speculative_config`. `vllm_drafts` samples their steps.

ngram    drafts are looked up in a sequence's own text
mtp      drafts of the policy's first head of multi-token prediction, applied again to its own output
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "speculative_config"

# Words in a model's path by which vLLM 0.32 chooses a method, whatever method is named.
_OTHER_DRAFTS = ("eagle-", "eagle3", "dflash", "dspark")


def drafts_of(arguments: Mapping[str, object]) -> int:
    """The most drafts of a sequence and step; 0 without speculation."""
    given = arguments.get(KEY)
    return int(given["num_speculative_tokens"]) if isinstance(given, Mapping) else 0


def proposed_on(device: str, arguments: Mapping[str, Any]) -> dict[str, object]:
    """The argument with vLLM's proposer for the device.

    N-grams are looked up on a GPU there, with which vLLM schedules a step before the tokens of the last are known. On a
    CPU a head reads the tokens that count and no others: where vLLM 0.32's first model runner passes it rejected ones
    too, it takes a prompt's last token for the one behind a part of the prompt.
    """
    given = dict(arguments[KEY])
    if given["method"] == "mtp":
        return {KEY: {**given, "disable_padded_drafter_batch": device == "cpu"}}
    return {KEY: {**given, "method": "ngram_gpu" if device == "cuda" else "ngram"}}


def check_path(folder: Path) -> None:
    """Raises UserError where vLLM would take a policy's own folder for other drafts than those of its head."""
    taken = next((word for word in _OTHER_DRAFTS if word in str(folder).lower()), None)
    if taken is not None:
        raise UserError(f"rollout.engine_args.{KEY}: vLLM takes {folder} for drafts of {taken!r}: name it otherwise")


def check_states(config: VllmConfig) -> None:
    """Raises UserError where drafts are asked for a policy with recurrent states, which a rejected draft changes."""
    model = config.model_config
    softmax = model.get_num_layers_by_block_type(config.parallel_config, "attention")
    if config.speculative_config is not None and softmax < model.get_num_layers(config.parallel_config):
        raise UserError(
            f"rollout.engine_args.{KEY} must stay unset for this policy: its recurrent layers (lightning, delta rule, "
            "convolution) keep one state a sequence, from which a rejected draft cannot be taken back"
        )
