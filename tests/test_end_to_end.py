"""Whole runs: Ray, vLLM and two learner ranks; the same run twice; and, marked slow, that the quickstart learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cispo.recipe.load import read_stored

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
# Reading and rendering all the rows would take longer than such a run.
FEW_ROWS = ["sft.data.limit=500", "data.limit=500"]
SMALL = [
    *FEW_ROWS,
    "runtime=local",
    "rollout.engine=torch",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "learner.ranks=1",
    "eval.limit=8",
]
# So short a run answers nothing right: without this all rewards would be equal and nothing learned.
VARIED = "reward={functions: [{fn: 'tests.varied_reward:varied'}]}"


def cispo(*arguments: str, timeout: float = 240) -> str:
    """Runs the command line in a process of its own, from the project's root; returns what it printed."""
    command = [sys.executable, "-m", "cispo.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ray_vllm_two_ranks_and_an_off_policy_algorithm(tmp_path: Path):
    """GRPO with two updates a batch, anchored on the learner's own logprobs, over 2 ranks and 2 engines."""
    out = cispo(
        "train",
        str(QUICKSTART),
        f"output_dir={tmp_path}",
        "rollout.engine=vllm",
        "sft.steps=12",
        "train.steps=2",
        "eval.limit=32",
        "learner.ranks=2",
        "rollout.engines=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=8",
        "algorithm.name=grpo",
        "algorithm.ratio_max=null",
        "algorithm.updates_per_batch=2",
        "algorithm.zero_variance=keep",
    )
    run = tmp_path / "quickstart"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["learner/updates"] == 2 and row["learner/skipped"] == 0
        # The engines sampled with the weights that the learner then trains: only float32 rounding is between them.
        assert row["mismatch/logprob_max"] < 1e-4 and row["mismatch/prob_pearson"] > 0.999999
        assert row["staleness/max"] == 0 and row["tokens_in_loss"] > 0
        # The reference is the policy at the start; both are computed by the same learner.
        assert row["kl/reference"] >= 0 and (row["step"] > 1 or row["kl/reference"] < 0.1)
    assert rows[0]["eval/accuracy"] >= 0 and "held-out accuracy" in out
    assert (run / "learning_curve.png").exists()
    board = EventAccumulator(str(run)).Reload()
    assert set(board.Tags()["scalars"]) >= {name for row in rows for name in row} - {"step"}
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [
        (row["step"], pytest.approx(row["reward/mean"])) for row in rows if "reward/mean" in row
    ]
    sampled = pq.read_table(run / "samples" / "train_000002.parquet").to_pylist()
    assert len(sampled) == 32 and {row["version"] for row in sampled} == {2}
    assert json.loads((run / "checkpoints" / "step_000002" / "cispo.json").read_text())["updates"] == 4


def test_ppo_with_a_critic_on_ray(tmp_path: Path):
    """A critic of two ranks beside the learner's; four minibatches, two epochs; it learns alone in the first step.

    The engine is the one that a policy of this size gets on a CPU.
    """
    cispo(
        "train",
        str(QUICKSTART),
        f"output_dir={tmp_path}",
        "sft.steps=12",
        "train.steps=3",
        "eval.limit=16",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "algorithm={name: ppo, ratio_max: null, updates_per_batch: 4, epochs: 2}",
        "algorithm={kl_coef: 0.01, kl_in: reward, kl: k1}",
        "critic.warmup_steps=1",
        "critic.lr=1e-3",
        VARIED,
    )
    rows = metrics(tmp_path / "quickstart")
    assert read_stored(tmp_path / "quickstart" / "recipe.yaml").rollout.engine == "torch"
    assert max(row["mismatch/logprob_max"] for row in rows[2:]) < 1e-4
    assert [row["learner/updates"] for row in rows[1:]] == [0, 8, 8]
    assert [row["total/updates"] for row in rows] == [0, 0, 8, 16]
    for row in rows[1:]:
        assert row["critic/skipped"] == 0 and row["critic/explained_variance"] <= 1
    # A new critic says 0; what it learned while it was alone shows in the next step.
    assert rows[1]["critic/value_mean"] == 0 and rows[2]["critic/value_mean"] > 0.02
    assert "is/ratio_max" not in rows[1] and rows[2]["is/ratio_max"] > 1.001


def test_asynchronous_with_weights_by_broadcast(tmp_path: Path):
    """Two engines in a gloo group with the learner take checked weights in flight and sample ahead within the bound."""
    arguments = ["sft.steps=6", "train.steps=6", "eval.limit=16", VARIED, "learner.ranks=1", "rollout.engines=2"]
    arguments += ["rollout.prompts_per_step=4", "rollout.group_size=4", "learner.lr=1e-3", *FEW_ROWS]
    arguments += ["rollout.engine=vllm", "rollout.weight_sync=broadcast", "rollout.verify_weights=true"]
    arguments += ["control={max_staleness: 2, on_update: recompute}"]
    cispo("train", str(QUICKSTART), f"output_dir={tmp_path}", *arguments)
    run = tmp_path / "quickstart"
    rows = metrics(run)[1:]
    assert [row["learner/updates"] for row in rows] == [1] * 6 and all(row["grad_norm"] > 0 for row in rows)
    # Tokens of the learner's own version, where there are any: only rounding is between engine and learner.
    assert max(row.get("mismatch/logprob_max", 0.0) for row in rows) < 1e-4
    assert rows[0]["staleness/max"] == 0 and 1 <= max(row["staleness/max"] for row in rows) <= 2
    for step in range(1, 7):
        # Step s trains version s.
        sampled = pq.read_table(run / "samples" / f"train_{step:06d}.parquet").to_pylist()
        assert len(sampled) == 16 and all(step - 2 <= r["version"] <= r["version_max"] <= step for r in sampled)


def test_the_same_run_twice_is_the_same_run(tmp_path: Path):
    """Seeds come from identities: every metric but time repeats, and a second run loses nothing of the first."""
    arguments = [str(QUICKSTART), f"output_dir={tmp_path}", *SMALL, "sft.steps=5", "train.steps=2"]
    arguments.append("algorithm.zero_variance=keep")
    for _ in range(2):
        cispo("train", *arguments)
    first, again = (
        [
            {k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith(("per_s", "seconds"))}
            for row in metrics(run)
        ]
        for run in (tmp_path / "quickstart", tmp_path / "quickstart-2")
    )
    assert first == again and len(first) == 3
    cispo("train", *arguments, "seed=1")
    other = metrics(tmp_path / "quickstart-3")
    assert other[1]["entropy"] != first[1]["entropy"]


def test_the_torch_engine_and_prompts_read_once(tmp_path: Path):
    """A whole run in one process: the sampler's log-probabilities are the learner's, before and after updates."""
    options = ["rollout.engine=torch", "learner.share_prompts=true", "runtime=local", "learner.ranks=1"]
    small = [*SMALL, "sft.steps=5", "train.steps=3", "learner.lr=1e-3", VARIED]
    cispo("train", str(QUICKSTART), f"output_dir={tmp_path}", *small, *options)
    rows = metrics(tmp_path / "quickstart")[1:]
    assert len(rows) == 3 and all(row["learner/updates"] >= 1 and row["grad_norm"] > 0 for row in rows)
    assert max(row["mismatch/logprob_max"] for row in rows) < 1e-4


def test_warm_up_then_train_from_its_checkpoint_then_export(tmp_path: Path):
    small = [f"output_dir={tmp_path}", *SMALL, "train.steps=1"]
    cispo("sft", str(QUICKSTART), *small, "sft.steps=3")
    checkpoint = tmp_path / "quickstart" / "checkpoints" / "step_000003"
    policy = [f"policy.model={checkpoint}", "policy.config=null", "policy.tokenizer=null", "sft=null"]
    cispo("train", str(QUICKSTART), *small, *policy)
    trained = tmp_path / "quickstart-2" / "checkpoints" / "step_000001"
    line = cispo("evaluate", str(QUICKSTART), *small, "--checkpoint", str(trained))
    result = json.loads(line.splitlines()[-1])
    assert 0 <= result["eval/accuracy"] <= 1 and result["prompts"] == 8
    answers = cispo("generate", str(QUICKSTART), *small, "--checkpoint", str(trained), "--prompt", "2>", "-n", "2")
    assert "logprob" in answers
    assert "float32" in cispo("export", str(trained), "--to", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "tokenizer.json").exists()


def test_show_and_doctor():
    shown = cispo("show", str(QUICKSTART), "algorithm.ratio_max=1.2", "algorithm.ratio_anchor=old")
    assert "[0, 1.2]" in shown and "PPO-like" in shown and "inert" in shown and "930,560 parameters" in shown
    assert "1 torch engine" in shown and "torch: 904,576 parameters in layers, at most" in shown
    assert "vllm: the recipe names it" in cispo("show", str(QUICKSTART), "rollout.engine=vllm")
    assert "all checks passed" in cispo("doctor")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "engine"), [(0, "auto"), (1, "auto"), (2, "auto"), (0, "vllm")])
def test_the_quickstart_learns(tmp_path: Path, seed: int, engine: str):
    """Sampling accuracy on 400 held-out problems: at least 0.80 and 0.3 above the warm-up's, for every seed."""
    keys = [f"output_dir={tmp_path}", f"seed={seed}", f"rollout.engine={engine}"]
    cispo("train", str(QUICKSTART), *keys, timeout=1200)
    rows = metrics(tmp_path / "quickstart")
    first, last = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]
    assert last >= 0.8 and last - first >= 0.3
    assert max(row.get("mismatch/kl_k3", 0.0) for row in rows) < 1e-6
