"""The examples of docs/ do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cispo.algorithms import ALGORITHMS, Algorithm, Changes, resolve
from cispo.algorithms.presets import PRESETS
from cispo.types import LossInputs

DOCS = Path(__file__).parents[1] / "docs"


def test_an_algorithm_of_your_own():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "algorithms.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    algorithm = names["SOFT"]
    assert isinstance(algorithm, Algorithm)
    old = torch.tensor([0.01, 0.5]).double().log()
    x = LossInputs(
        logprobs=torch.tensor([0.12, 0.5]).double().log().requires_grad_(),
        anchor_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.tensor([1.0, -1.0]).double(),
        mask=torch.ones(2).bool(),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
    )
    output = resolve(algorithm, Changes()).objective(x)
    expected = torch.tensor([-1.0, 1.0]).double() * 4 * torch.tanh(torch.tensor([12.0, 1.0]).double() / 4)
    assert torch.allclose(torch.autograd.grad(output.loss.sum(), x.logprobs)[0], expected)


def test_every_algorithm_and_preset_is_documented():
    text = (DOCS / "algorithms.md").read_text()
    assert [name for name in (*ALGORITHMS, *PRESETS) if f"`{name}`" not in text] == []
