"""Who may import whom: arrows point down only. The table is the architecture; docs/design.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cispo"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("commands", "compare"),
    ("run",),
    ("controller",),
    ("evaluate",),
    ("buffer", "metrics", "warmup", "start"),
    ("rollout", "workers"),
    ("learner", "engines"),
    ("batch", "weights"),
    ("policies", "algorithms", "output", "runtime"),
    ("recipe", "sandbox", "files", "user_code"),
    ("ops", "types", "errors", "seeds"),
)
"""The rooms of the package, a file or a folder each, top to bottom. Rooms of one layer do not import one another, but
for those of `WITHIN_A_LAYER`; inside a folder modules import one another without a circle."""

WITHIN_A_LAYER = {("metrics", "buffer")}

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
