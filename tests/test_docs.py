"""The examples of docs/ do what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
import yaml

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.choice import resolve
from cispo.algorithms.presets import PRESETS
from cispo.recipe.load import known_keys, parse_recipe
from cispo.recipe.schema import Algorithm as AlgorithmSection
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
    output = resolve(algorithm, AlgorithmSection()).objective(x)
    expected = torch.tensor([-1.0, 1.0]).double() * 4 * torch.tanh(torch.tensor([12.0, 1.0]).double() / 4)
    assert torch.allclose(torch.autograd.grad(output.loss.sum(), x.logprobs)[0], expected)


def test_the_curriculum_of_the_docs():
    (snippet,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "curriculum.md").read_text(), re.DOTALL)
    values = yaml.safe_load(snippet)
    values["rollout"]["max_context"] = 4096
    keys = parse_recipe({"policy": {"config": {}, "tokenizer": "t"}, **values}).curriculum
    assert set(values["curriculum"]) == set(type(keys).model_fields), "every key is in the example"


def test_every_algorithm_and_preset_is_documented():
    text = (DOCS / "algorithms.md").read_text()
    assert [name for name in (*ALGORITHMS, *PRESETS) if f"`{name}`" not in text] == []


def test_the_cluster_examples_parse():
    """The Slurm script as bash reads it, the RayJob as YAML; both start a command that exists with keys that exist."""
    text = (DOCS / "cluster.md").read_text()
    (script,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    (job,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (slurm_command,) = re.findall(r"cispo train .*", script)
    keys = {key for key, _ in known_keys()}
    for command in (job["spec"]["entrypoint"], slurm_command):
        program, verb, recipe, *overrides = command.split()
        assert (program, verb) == ("cispo", "train") and recipe.endswith(".yaml") and overrides
        assert {item.partition("=")[0] for item in overrides} <= keys
