"""Tokens that PPO's and DAPO's clip would have dropped: the "However, Wait, Aha" table of CISPO's paper, for any run.

A token is dropped where the clip gives it no gradient: a ratio beyond the band on the side of its advantage. Trained
tokens are counted by token id over a whole run, once for each update in which they took part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cispo.algorithms.losses import ppo_drops
from cispo.types import TokenStats

BANDS: dict[str, tuple[float, float]] = {"ppo": (0.2, 0.2), "dapo": (0.2, 0.28)}
"""Name -> (clip_low, clip_high)."""


def would_drop(ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """[N] bool each: ppo_dropped_posadv, ppo_dropped_negadv, dapo_dropped_posadv, dapo_dropped_negadv."""
    found = {}
    for band, (low, high) in BANDS.items():
        dropped = ppo_drops(ratio, advantages, clip_low=low, clip_high=high)
        found[f"{band}_dropped_posadv"] = dropped & (advantages > 0)
        found[f"{band}_dropped_negadv"] = dropped & (advantages < 0)
    return found


@dataclass(slots=True)
class DroppedTokens:
    """Counts over a run, indexed by token id."""

    counts: dict[str, Tensor] = field(default_factory=dict)
    """Name -> [largest token id + 1] int64."""

    def add(self, tokens: TokenStats) -> None:
        """Counts the trained tokens of a step."""
        masks = {
            "count": torch.ones_like(tokens.targets, dtype=torch.bool),
            "kept": tokens.weight != 0,
            **would_drop(tokens.ratio, tokens.advantages),
        }
        for name, mask in masks.items():
            new = torch.bincount(tokens.targets[mask])
            old = self.counts.get(name, new.new_zeros(0))
            size = max(len(new), len(old))
            self.counts[name] = _padded(old, size) + _padded(new, size)

    def rows(self, decode: Callable[[int], str], limit: int = 200) -> list[dict[str, int | str]]:
        """The tokens that PPO's clip would have dropped most often, with all counts, at most `limit`.

        Example: {"token": "Wait", "id": 14190, "count": 31, "kept": 31, "ppo_dropped": 9, "ppo_dropped_posadv": 8, ...}
        """
        if not self.counts:
            return []
        size = max(map(len, self.counts.values()))
        table = {name: _padded(counts, size) for name, counts in self.counts.items()}
        dropped = table["ppo_dropped_posadv"] + table["ppo_dropped_negadv"]
        order = dropped.argsort(descending=True, stable=True)[:limit].tolist()
        return [
            {
                "token": decode(i),
                "id": i,
                "ppo_dropped": int(dropped[i]),
                **{name: int(counts[i]) for name, counts in table.items()},
            }
            for i in order
            if dropped[i] > 0
        ]


def _padded(counts: Tensor, size: int) -> Tensor:
    """Counts with zeros for the ids up to `size`."""
    return torch.nn.functional.pad(counts, (0, size - len(counts)))
