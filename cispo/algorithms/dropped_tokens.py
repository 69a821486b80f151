"""Which tokens PPO's and DAPO's clip would have dropped: the "However, Wait, Aha" table of CISPO's paper, for any run.

A token is dropped where the clip gives it no gradient: a ratio beyond the band on the side of its advantage. The counts
are of trained tokens (one for each time an update saw it), by token id, over a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cispo.algorithms.losses import ppo_drops

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
    """Counts over a run, one row a vocabulary entry."""

    counts: dict[str, Tensor] = field(default_factory=dict)
    """Column -> [largest token id + 1] int64."""

    def add(self, tokens: Mapping[str, Tensor]) -> None:
        """Takes the trained tokens [N] of a step: targets, ratio, weight and advantages."""
        targets = tokens["targets"]
        columns = {
            "count": torch.ones_like(targets, dtype=torch.bool),
            "kept": tokens["weight"] != 0,
            **would_drop(tokens["ratio"], tokens["advantages"]),
        }
        for name, chosen in columns.items():
            new = torch.bincount(targets[chosen])
            old = self.counts.get(name, new.new_zeros(0))
            size = max(len(new), len(old))
            self.counts[name] = torch.nn.functional.pad(old, (0, size - len(old))) + torch.nn.functional.pad(
                new, (0, size - len(new))
            )

    def rows(self, decode: Callable[[int], str], limit: int = 200) -> list[dict[str, int | str]]:
        """The tokens that PPO's clip would have dropped most often, with all counts, at most `limit`.

        Example: {"token": "Wait", "id": 14190, "count": 31, "kept": 31, "ppo_dropped": 9, "ppo_dropped_posadv": 8, ...}
        """
        if not self.counts:
            return []
        size = max(map(len, self.counts.values()))
        table = {name: torch.nn.functional.pad(c, (0, size - len(c))) for name, c in self.counts.items()}
        dropped = table["ppo_dropped_posadv"] + table["ppo_dropped_negadv"]
        order = dropped.argsort(descending=True, stable=True)[:limit].tolist()
        return [
            {
                "token": decode(i),
                "id": i,
                "ppo_dropped": int(dropped[i]),
                **{name: int(column[i]) for name, column in table.items()},
            }
            for i in order
            if dropped[i] > 0
        ]
