"""Who may import whom: arrows point down only. The table is the architecture; docs/design.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cispo"

LAYERS: dict[str, int] = {
    "cli": 9,
    "compare": 8,
    "commands": 8,
    "inspection": 8,
    "run": 7,
    "arms": 7,
    "controller": 6,
    "evaluate": 6,
    "assemble": 5,
    "workers": 5,
    "actors": 5,
    "cluster": 4,
    "placement": 4,
    "learner.learner": 4,
    "learner.critic": 4,
    "buffer": 5,
    "step_metrics": 5,
    "checkpoint_writer": 5,
    "warmup": 6,
    "batch": 3,
    "dropped_tokens": 3,
    "learner.sft": 4,
    "weight_sync": 3,
    "weight_buckets": 3,
    "rollout.rollout": 4,
    "rollout.stored": 4,
    "rollout.engine": 4,
    "rollout.vllm_engine": 4,
    "rollout.vllm_start": 4,
    "rollout.torch_engine": 4,
    "rollout.torch_sampler": 3,
    "rollout.recorder": 3,
    "packing": 3,
    "rollout.prompts": 3,
    "rollout.prompt_source": 3,
    "rollout.renderer": 3,
    "rollout.rewards": 3,
    "rollout.reward_worker": 3,
    "rollout.reward_process": 3,
    "rollout.drafts": 3,
    "rollout.stream": 3,
    "rollout.serving": 4,
    "learner.parallel": 3,
    "learner.optim": 3,
    "learner.loss": 3,
    "policies": 2,
    "algorithms": 2,
    "settings_report": 2,
    "comparison_report": 2,
    "comparison_figures": 2,
    "comparison": 1,
    "scaling": 2,
    "statistics": 1,
    "ops": 1,
    "report": 1,
    "runfolder": 1,
    "checkpoint": 1,
    "interrupts": 1,
    "resume": 1,
    "watchdog": 1,
    "screen": 1,
    "sandbox": 1,
    "confinement": 0,
    "types": 0,
    "config": 0,
    "contradictions": 0,
    "curriculum": 0,
    "metrics": 0,
    "loading": 0,
    "files": 0,
    "network": 0,
    "leftovers": 0,
    "ray_address": 1,
    "shipping": 1,
    "seeds": 0,
}
"""Layer of each module, or of each package whose modules may import one another."""

# Where a heavy library may be imported at all, and the rest of the project does without.
ONLY_IN = {
    "ray": {"actors", "cluster"},
    "vllm": {
        "policies.vllm_lightning",
        "policies.vllm_plugin",
        "policies.vllm_shares",
        "policies.vllm_states",
        "rollout.vllm_engine",
        "rollout.vllm_start",
        "weight_sync",
    },
    "torch.distributed": {"learner.parallel", "network", "weight_buckets"},
    "triton": {"ops.lightning_kernels", "ops.lightning_triton", "ops.logprobs_triton"},
}


def modules() -> dict[str, Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return {name: f for name, f in names.items() if name != "__init__"}


def layer(name: str) -> tuple[str, int] | None:
    for known in (name, name.rpartition(".")[0]):
        if known in LAYERS:
            return known, LAYERS[known]
    return None


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str):
    if name in ("rollout", "learner", "confinement"):
        assert not imports(modules()[name]), "these packages have no content of their own"
        return
    own = layer(name)
    assert own, f"{name} has no layer: give it one in LAYERS"
    for target in imports(modules()[name]):
        inner = target.removeprefix("cispo.")
        if target == inner or inner not in modules():
            continue
        other = layer(inner)
        assert other, f"{name} imports {inner}, which has no layer"
        assert other[1] < own[1] or other[0] == own[0] or _beside(name, inner), f"{name} must not import {inner}"


def _beside(name: str, inner: str) -> bool:
    """Modules of one layer may use each other inside a package, but the sampling and training sides never meet."""
    packages = {name.partition(".")[0], inner.partition(".")[0]}
    return layer(name)[1] == layer(inner)[1] and packages != {"rollout", "learner"}  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(modules()))
def test_sampling_and_training_never_meet(name: str):
    side = name.partition(".")[0]
    other = {"rollout": "learner", "learner": "rollout"}.get(side)
    if other:
        assert not any(target.startswith(f"cispo.{other}") for target in imports(modules()[name]))


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_place(library: str):
    users = {
        name
        for name, file in modules().items()
        if any(target == library or target.startswith(library + ".") for target in imports(file))
    }
    assert users and users <= ONLY_IN[library]


def test_the_command_line_imports_nothing_heavy():
    """`cispo --help` answers in under half a second because of this."""
    code = (
        "import sys, cispo.cli; "
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'datasets', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_operations_on_a_cpu_import_no_triton_and_touch_no_cuda():
    """Triton looks for a driver when it is imported; a machine without a GPU has none, and may have no Triton."""
    code = (
        "import sys, torch, cispo.ops.reference, cispo.ops.lightning as a, cispo.ops.logprobs as b; "
        "x = torch.randn(5, 2, 4, requires_grad=True); w = torch.randn(9, 8, requires_grad=True); "
        "starts = torch.tensor([0, 5], dtype=torch.int32); t = torch.arange(5); "
        "o, _ = a.lightning_attention(x, x, x, torch.rand(2), starts); "
        "b.fused_token_loss(o.flatten(1), w, t, lambda logprobs, *_: -logprobs)[0].backward(); "
        "a.lightning_decode(x, x, x, torch.rand(2), torch.zeros(5, 2, 4, 4), t); "
        "found = {m for m in sys.modules if m.partition('.')[0] == 'triton'}; "
        "sys.exit(str(found) if found or torch.cuda.is_initialized() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
