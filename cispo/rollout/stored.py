"""Scored groups as JSON and back, exactly: what a checkpoint keeps of rollouts that are yet to be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from cispo.rollout.rollout import Rollouts
from cispo.types import Completion, FinishReason, Prompt, Trajectory, TrajectoryGroup, Turn


def rollouts_to_json(rollouts: Rollouts) -> dict[str, Any]:
    """Plain values; prompts are named by their ids, numbers keep every digit.

    Columns that a reward function asked to log must be what JSON can hold; others become text.
    """
    plain = {f.name: getattr(rollouts, f.name) for f in fields(Rollouts) if f.name != "groups"}
    groups = [
        {"prompt": group.prompt.id, "trajectories": [asdict(t) for t in group.trajectories]}
        for group in rollouts.groups
    ]
    return plain | {"groups": groups}


def rollouts_from_json(values: Mapping[str, Any], prompts: Sequence[Prompt]) -> Rollouts:
    """What `rollouts_to_json` was given, once it went through a file; `prompts` are the dataset."""
    groups = [
        TrajectoryGroup(prompt=prompts[group["prompt"]], trajectories=tuple(map(_trajectory, group["trajectories"])))
        for group in values["groups"]
    ]
    return Rollouts(**{**values, "groups": groups})


def _trajectory(values: Mapping[str, Any]) -> Trajectory:
    return Trajectory(**{**values, "turns": tuple(map(_turn, values["turns"]))})


def _turn(values: Mapping[str, Any]) -> Turn:
    completion = {
        **values["completion"],
        "token_ids": tuple(values["completion"]["token_ids"]),
        "logprobs": tuple(values["completion"]["logprobs"]),
        "finish_reason": FinishReason(values["completion"]["finish_reason"]),
        "versions": tuple(values["completion"]["versions"]),
    }
    return Turn(
        **{
            **values,
            "prompt_ids": tuple(values["prompt_ids"]),
            "completion": Completion(**completion),
            "observation": tuple(values["observation"]),
        }
    )
