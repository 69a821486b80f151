"""transformers' config classes for the original dialect's model types, which transformers does not know.

They keep every key of config.json as it is: `config.parse_config` gives the keys their meaning. A process that runs an
engine unpickles them by name.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


class MiniMaxM1Config(PreTrainedConfig):
    model_type = "minimax_m1"


class MiniMaxText01Config(PreTrainedConfig):
    model_type = "minimax_text_01"
