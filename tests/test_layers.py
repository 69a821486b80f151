"""Who may import whom: arrows point down only. The table is the architecture; docs/design.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cispo"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("trl",),
    ("api", "cli"),
    ("commands", "compare"),
    ("run",),
    ("controller",),
    ("evaluate", "tools"),
    ("metrics", "warmup", "start", "agents"),
    ("rollout", "workers"),
    ("learner", "engines"),
    ("batch", "weights"),
    ("policies", "algorithms", "output", "runtime"),
    ("recipe", "sandbox", "files"),
    ("ops", "types", "errors"),
)
"""The rooms of the package, a file or a folder each, top to bottom. A room imports only rooms of lower layers."""

LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}

# Where a heavy library may be imported at all, and the rest of the project does without.
ONLY_IN = {
    "ray": {"runtime.actors", "runtime.cluster", "runtime.host", "runtime.local_cluster"},
    "vllm": {
        "agents.parsing",
        "engines.draft_arguments",
        "engines.vllm_drafts",
        "engines.vllm_engine",
        "engines.vllm_sample",
        "engines.vllm_scheduler",
        "engines.vllm_start",
        "engines.vllm_steady",
        "policies.hybrid.vllm_attention",
        "policies.hybrid.vllm_config",
        "policies.hybrid.vllm_heads",
        "policies.hybrid.vllm_latents",
        "policies.hybrid.vllm_model",
        "policies.hybrid.vllm_states",
        "policies.minimax.vllm_lightning",
        "policies.minimax.vllm_model",
        "policies.minimax.vllm_states",
        "policies.vllm_experts",
        "policies.vllm_plugin",
        "policies.vllm_ranks",
        "policies.vllm_slots",
        "weights.vllm_receiver",
    },
    "torch.distributed": {
        "learner.parallel",
        "learner.rows",
        "learner.sharding",
        "ops.collectives",
        "ops.ragged",
        "runtime.network",
        "weights.buckets",
    },
    "fla": {"ops.delta_fla"},
    "triton": {
        "ops.convolution_triton",
        "ops.delta_triton",
        "ops.experts_triton",
        "ops.lightning_kernels",
        "ops.lightning_overlap",
        "ops.lightning_triton",
        "ops.logprobs_triton",
        "ops.norms_triton",
    },
}


def _modules() -> dict[str, Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return {name: f for name, f in names.items() if name != "__init__"}


MODULES = _modules()


def imports(file: Path) -> set[str]:
    """Every imported name, also where the import is inside a function or for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ARROWS = {
    name: {inner for target in imports(file) if (inner := target.removeprefix("cispo.")) != target} & MODULES.keys()
    for name, file in MODULES.items()
}
"""Module -> the project's modules that it imports."""


def room(name: str) -> str:
    return name.partition(".")[0]


def circle(arrows: Mapping[str, Collection[str]]) -> list[str]:
    """Some circle of the graph, [] where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next(filter(None, (visit(target, [*path, name]) for target in sorted(arrows[name]))), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in arrows)), [])


def test_every_room_has_a_layer():
    assert LAYER.keys() == {room(name) for name in MODULES}
    entries = [f for f in PACKAGE.iterdir() if f.name != "__pycache__"]
    assert len(entries) <= 30, "a newcomer grasps the top of the package in one look"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str):
    """This alone keeps circles between rooms away, sampling and training apart (`rollout`, `learner`) included."""
    against = {t for t in ARROWS[name] if room(t) != room(name) and LAYER[room(t)] <= LAYER[room(name)]}
    assert not against, f"{name} must not import {', '.join(sorted(against))}"


@pytest.mark.parametrize("name", ["learner", "engines", "rollout"])
def test_sampling_and_training_never_meet(name: str):
    others = {"learner": {"engines", "rollout"}, "engines": {"learner", "rollout"}, "rollout": {"learner", "engines"}}
    met = {(m, t) for m in MODULES if room(m) == name for t in ARROWS[m] if room(t) in others[name]}
    assert not met


def test_no_import_circle():
    """Lazy and type-only imports count: a circle of either kind says that two files are one subject cut badly."""
    assert not circle({name: targets - {name} for name, targets in ARROWS.items()})


def test_a_circle_would_be_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"] and not circle(
        {"a": ["b", "c"], "b": ["c"], "c": []}
    )


@pytest.mark.parametrize("name", [name for name, file in MODULES.items() if file.name == "__init__.py"])
def test_packages_are_empty(name: str):
    """But for `algorithms`, whose record table is its subject."""
    assert name == "algorithms" or not MODULES[name].read_text().strip()


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_place(library: str):
    users = {
        name
        for name, file in MODULES.items()
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
