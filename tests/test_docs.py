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
from scripts.make_keys import MOST_USED, page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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
    """The Slurm scripts as bash reads them, the RayJob as YAML; all start a command and keys that exist."""
    text = (DOCS / "cluster.md").read_text()
    scripts = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
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
    slurm_commands = re.findall(r"cispo train .*(?= --resume auto)", "".join(scripts))
    assert len(slurm_commands) == 2
    keys = {key for key, _ in known_keys()}
    for command in (job["spec"]["entrypoint"], *slurm_commands):
        program, verb, recipe, *overrides = command.split()
        assert (program, verb) == ("cispo", "train") and recipe.endswith(".yaml") and overrides
        assert {item.partition("=")[0] for item in overrides} <= keys


def test_the_page_of_keys_is_fresh():
    """`python scripts/make_keys.py` writes it."""
    assert sum(map(len, MOST_USED.values())) == 30
    assert (DOCS / "keys.md").read_text() == page()


def test_the_index_has_every_page_once():
    linked = re.findall(r"\]\(([\w.-]+)\)", (DOCS / "README.md").read_text())
    pages = {file.name for file in DOCS.iterdir() if file.suffix in (".md", ".ipynb")} - {"README.md"}
    assert sorted(linked) == sorted(pages)


def test_links_between_pages_lead_somewhere():
    """Files beside the page and headings in them; addresses on the network are not looked up."""
    lost = []
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", file.read_text()):
            name, _, heading = target.partition("#")
            page_linked = file.parent / name if name else file
            if not page_linked.exists() or (heading and heading not in _anchors(page_linked)):
                lost.append(f"{file.name}: {target}")
    assert lost == []


def _anchors(file: Path) -> set[str]:
    """Names that headings get where Markdown is shown."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
