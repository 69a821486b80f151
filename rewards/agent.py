"""Process rewards of attempts with tools or an environment: counts, to be given a negative weight.

reward: {functions: [{fn: "rewards.exact:exact_match"}, {fn: "rewards.agent:failed_calls", weight: -0.1}]}
"""

from __future__ import annotations

from collections.abc import Sequence


def failed_calls(completion: str, failed_calls: int) -> float:
    """Calls of an unknown tool, with wrong arguments, that raised, or that took too long."""
    return float(failed_calls)


def unreadable(completion: str, unreadable: int) -> float:
    """Replies with a call that could not be read."""
    return float(unreadable)


def turns(completion: str, turns: int) -> float:
    """Replies of the attempt."""
    return float(turns)


def calls(completion: str, calls: int) -> float:
    """Calls of the attempt."""
    return float(calls)


def tokens(completion: str, token_ids: Sequence[int]) -> float:
    """Tokens of the last reply."""
    return float(len(token_ids))


def earned(completion: str, turn_rewards: Sequence[float]) -> float:
    """The sum of the rewards that an environment or an agent gave: with weight 0, since they are trained on as they
    are, as the measure of right and wrong where nothing else scores the last reply."""
    return sum(turn_rewards)
