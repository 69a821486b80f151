"""One self-contained web page of a run's samples: Samples -> JSON and base64 arrays in script tags -> HTML.

    "facts"      JSON: run, notes, sets, prompts, one list an attribute with an entry an attempt, the vocabulary in use
    "ids"        uint16 or uint32: places in the vocabulary, attempt after attempt
    "flags"      uint8, "weight" ... "logprob" float16: an entry a sampled token of the attempts with values

Arrays are decoded when an attempt is opened. The page fetches nothing; its policy (CSP) forbids it.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cispo.commands.view.samples import KEPT, PPO_DROPS, VALUES, Attempt, Samples, Tokens

# The colour scale of a value ends at this quantile of its distances from the centre.
_SCALE_QUANTILE = 0.95

_CENTRES = {"weight": 1.0, "ratio": 1.0}
"""Values that are shown by their logarithm, around 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A typed array of the page."""

    name: str
    dtype: str
    data: str
    """Base64."""


def render_page(samples: Samples, *, run: str, title: str, token_text: Callable[[int], str]) -> str:
    """The page's HTML. `token_text` gives the text of a token id."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    facts, blobs = page_data(samples, token_text)
    made = Environment(
        loader=PackageLoader("cispo.commands.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts |= {"run": run, "title": title, "notes": samples.notes, "total": samples.total}
    return made.get_template("view.html.j2").render(title=title, run=run, facts=script_json(facts), blobs=blobs)


def script_json(value: object) -> str:
    """JSON that no text in it can end the script tag of, or open a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page_data(samples: Samples, token_text: Callable[[int], str]) -> tuple[dict[str, object], list[Blob]]:
    """(facts, arrays) of the page."""
    attempts = samples.attempts
    kinds = sorted({a.kind for a in attempts}, key=lambda kind: (kind != "train", kind))
    prompts = dict.fromkeys((a.kind, a.prompt_id, a.prompt) for a in attempts)
    place = {key: number for number, key in enumerate(prompts)}
    of_prompt = [place[a.kind, a.prompt_id, a.prompt] for a in attempts]
    names = list(dict.fromkeys(name for a in attempts for name in a.rewards))
    reasons = list(dict.fromkeys(a.status or a.finish_reason for a in attempts))
    used, ids = _vocabulary(attempts)
    values = [name for name in VALUES if any(a.tokens and name in a.tokens.values for a in attempts)]
    stacked = {name: _stacked(attempts, name) for name in values}
    facts = {
        "kinds": kinds,
        "prompts": [[kinds.index(kind), number, text] for kind, number, text in prompts],
        "change": _changes(attempts, of_prompt, len(prompts)),
        "reasons": reasons,
        "rewardNames": names,
        "kind": [kinds.index(a.kind) for a in attempts],
        "step": [a.step for a in attempts],
        "prompt": of_prompt,
        "index": [a.index for a in attempts],
        "text": [a.completion for a in attempts],
        "reward": [_finite(a.reward) for a in attempts],
        "parts": [[_finite(a.rewards.get(name)) for name in names] for a in attempts],
        "extra": [dict(a.extra) or 0 for a in attempts],
        "reason": [reasons.index(a.status or a.finish_reason) for a in attempts],
        "length": [a.length for a in attempts],
        "version": [a.version for a in attempts],
        "update": [a.update for a in attempts],
        "messages": [list(a.messages) or 0 for a in attempts],
        "turns": [list(a.turn_rewards) if any(a.turn_rewards) else 0 for a in attempts],
        "spans": [a.tokens.spans if a.tokens else 0 for a in attempts],
        "valued": [int(bool(a.tokens and a.tokens.values)) for a in attempts],
        "rescued": [_rescued(a) for a in attempts],
        "entropy": [_of_values(a, "entropy", np.mean) for a in attempts],
        "gap": [_of_values(a, "gap", lambda x: np.abs(x).max()) for a in attempts],
        "vocabulary": [token_text(int(i)) for i in used],
        "vocabularyIds": [int(i) for i in used],
        "values": values,
        "scales": {name: _scale(stacked[name], _CENTRES.get(name, 0.0)) for name in values},
    }
    flags = np.concatenate([tokens.flags for tokens in _valued(attempts)] or [np.zeros(0, np.uint8)])
    blobs = [_blob("ids", ids), _blob("flags", flags)]
    return facts, blobs + [_blob(name, stacked[name].astype(np.float16)) for name in values]


def _vocabulary(attempts: Sequence[Attempt]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids in use, places in them of all tokens)."""
    tokens = np.concatenate([a.tokens.ids for a in attempts if a.tokens] or [np.zeros(0, np.int32)])
    used, places = np.unique(tokens, return_inverse=True)
    return used, places.astype(np.uint16 if len(used) <= 1 << 16 else np.uint32)


def _valued(attempts: Sequence[Attempt]) -> list[Tokens]:
    """The tokens of the attempts that have values."""
    return [a.tokens for a in attempts if a.tokens and a.tokens.values]


def _stacked(attempts: Sequence[Attempt], name: str) -> np.ndarray:
    """A value of all sampled tokens; NaN where an attempt has none."""
    parts = [tokens.values.get(name, np.full(len(tokens.flags), np.nan, np.float32)) for tokens in _valued(attempts)]
    # Beyond float16's range a value is an infinity, which the page would show as such.
    return np.clip(np.concatenate(parts), -65504, 65504)


def _scale(values: np.ndarray, centre: float) -> float:
    """Distance from the centre at which colours are full: in the logarithm around 1."""
    known = values[np.isfinite(values)]
    # A weight of 0 is a dropped token and has no logarithm.
    distances = np.abs(np.log(known[known > 0])) if centre == 1.0 else np.abs(known)
    found = float(np.quantile(distances, _SCALE_QUANTILE)) if len(distances) else 0.0
    return found if found > 0 else 1.0


def _changes(attempts: Sequence[Attempt], of_prompt: Sequence[int], count: int) -> list[float | None]:
    """Mean reward of each prompt at its last step minus at its first; None for prompts of one step."""
    rewards: list[dict[int, list[float]]] = [defaultdict(list) for _ in range(count)]
    for attempt, number in zip(attempts, of_prompt, strict=True):
        rewards[number][attempt.step].append(attempt.reward)
    found: list[float | None] = []
    for steps in rewards:
        means = [sum(steps[step]) / len(steps[step]) for step in sorted(steps)]
        found.append(_finite(means[-1] - means[0]) if len(means) > 1 else None)
    return found


def _rescued(attempt: Attempt) -> int:
    """Tokens that PPO's clip would have dropped and the run's loss kept."""
    both = PPO_DROPS | KEPT
    return int(((attempt.tokens.flags & both) == both).sum()) if attempt.tokens else 0


def _of_values(attempt: Attempt, name: str, function: Callable[[np.ndarray], np.floating]) -> float | None:
    values = attempt.tokens.values.get(name) if attempt.tokens else None
    return None if values is None or not len(values) else _finite(float(function(values)))


def _finite(value: float | None) -> float | None:
    """Six digits of a number; None for one that JSON cannot hold."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def _blob(name: str, values: np.ndarray) -> Blob:
    little = values.astype(values.dtype.newbyteorder("<"))
    return Blob(name=name, dtype=str(values.dtype), data=base64.b64encode(little.tobytes()).decode())
