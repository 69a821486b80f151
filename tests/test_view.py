"""Per-token values from the training pass to the samples' files, and the page of `cispo view`, in a browser too."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cispo.batch.packing import pack
from cispo.batch.samples import minibatches, to_samples
from cispo.commands.view.command import view
from cispo.commands.view.page import page_data, script_json
from cispo.commands.view.samples import DROPPED, KEPT, PPO_DROPS, read_samples, token_flags
from cispo.errors import UserError
from cispo.output.folder import RunLog
from cispo.output.token_values import TokenRecorder
from cispo.types import Completion, FinishReason, Prompt, TokenStats, Trajectory, TrajectoryGroup, Turn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def turn(context: Sequence[int], sampled: Sequence[int], *, continues: bool = False) -> Turn:
    """A turn in which the sampler's log-probability of a token is minus its id / 100."""
    completion = Completion(
        token_ids=tuple(sampled),
        logprobs=tuple(-i / 100 for i in sampled),
        finish_reason=FinishReason.STOP,
        versions=(1,) * len(sampled),
    )
    return Turn(context_ids=tuple(context), completion=completion, continues=continues)


def group(number: int, attempts: Sequence[Sequence[Turn]], *, status: str = "") -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            group_id=number,
            index=index,
            turns=tuple(turns),
            text=f"reply {index} </script><b>",
            reward=float(index),
            rewards={"judge": float(index)},
            status=status,
            messages=(
                {"role": "assistant", "content": "<think>hm</think>[look 3]", "reasoning_content": "hm",
                 "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": {"at": 3}}}]},
                {"role": "tool", "name": "look", "content": "a door"},
            ) if status else (),
        )
        for index, turns in enumerate(attempts)
    )  # fmt: skip
    return TrajectoryGroup(
        prompt=Prompt(id=number, messages=({"role": "user", "content": f"q{number}"},)), trajectories=trajectories
    )


GROUPS = [
    group(7, [[turn([1, 2], [10, 11, 12])], [turn([1, 2], [13])]], status="answered"),
    # One segment of two turns; then a rewritten history, which is a segment of its own.
    group(
        8,
        [
            [turn([3], [20, 21]), turn([4, 5], [22], continues=True), turn([6], [23, 24])],
            [turn([3], [25, 26, 27, 28])],
        ],
        status="answered",
    ),
    group(9, [[turn([1], [30])], [turn([1], [31, 32])]], status="answered"),
]


def trained(limit: int, *, epochs: int = 2) -> TokenRecorder:
    """A recorder after updates in which ratio, weight ... follow from the token's id and the number of the update."""
    samples = to_samples_of(GROUPS)
    recorder, update = TokenRecorder(limit), 0
    recorder.begin(GROUPS, samples)
    for epoch in range(epochs):
        for share in minibatches(GROUPS, samples, 2, seed=epoch):
            update += 1
            batches = pack(share, reduction="token", max_tokens=8, tokens_per_micro_batch=7, ranks=2)
            stats: list[TokenStats | None] = []
            for own in batches:
                ids = torch.cat([mb.targets[mb.loss_index] for mb in own]).float()
                rest: dict[str, Any] = {
                    "rollout_logprobs": -ids / 100,
                    "versions": torch.ones(len(ids), dtype=torch.int32),
                }
                stats.append(
                    TokenStats(
                        targets=ids.long(), logprobs=-ids / 50, advantages=ids - 20, ratio=ids / 20 + update,
                        weight=ids * 0 + update, entropy=ids, **rest,
                    )
                )  # fmt: skip
            recorder.add(share, batches, stats)
    return recorder


def to_samples_of(groups: Sequence[TrajectoryGroup]) -> list:
    return [sample for one in groups for sample in to_samples(one)]


def test_values_stay_with_their_tokens_through_minibatches_ranks_and_turns():
    rows = trained(limit=5).rows(GROUPS)
    attempts = [t for one in GROUPS for t in one.trajectories]
    assert [row is None for row in rows] == [False] * 5 + [True]
    for row, attempt in zip(rows, attempts, strict=True):
        if row is None:
            continue
        ids = [i for t in attempt.turns for i in t.completion.token_ids]
        assert row.sequence.tolist() == [i for t in attempt.turns for i in (*t.context_ids, *t.completion.token_ids)]
        assert row.values["entropy"].tolist() == ids and row.values["sampler_logprobs"] == pytest.approx(
            [-i / 100 for i in ids]
        )
        assert row.update in (3, 4), "the last epoch's"
        assert row.values["ratio"] == pytest.approx([i / 20 + row.update for i in ids])
        assert "old_logprobs" not in row.values
    assert rows[2] is not None and rows[2].spans.tolist() == [1, 2, 2, 1, 1, 2]


def test_attempts_that_were_not_trained_on_have_the_samplers_values():
    recorder = TokenRecorder(3)
    recorder.begin(GROUPS[1:2], to_samples_of(GROUPS[1:2]))
    rows = recorder.rows(GROUPS)
    assert [row is not None for row in rows] == [True, False, True, True, False, False]
    assert all(row is None or (set(row.values) == {"sampler_logprobs"} and row.update is None) for row in rows)
    assert not any(TokenRecorder(0).rows(GROUPS))


def test_the_file_has_lists_with_null_for_the_others(tmp_path: Path):
    log = RunLog(tmp_path)
    log.samples(1, GROUPS, tokens=trained(limit=5).rows(GROUPS))
    log.samples(2, GROUPS, tokens=TokenRecorder(0).rows(GROUPS))
    log.close()
    table = pq.read_table(tmp_path / "samples" / "train_000001.parquet")
    assert table["weight"].type == pa.list_(pa.float32()) and table["sequence"].type == pa.list_(pa.int32())
    assert table["entropy"].to_pylist()[2] == [20, 21, 22, 23, 24] and table["weight"].to_pylist()[5] is None
    assert "sequence" not in pq.read_table(tmp_path / "samples" / "train_000002.parquet").column_names


def test_flags_are_those_of_ppos_clip():
    ratio, advantage, weight = np.array(
        [[1.3, 1.3, 0.7, 0.7, 1.1, 2.0], [1, -1, 1, -1, 1, 1], [1.3, 1.3, 0.7, 0.7, 1.1, 0]], dtype=np.float32
    )
    flags = token_flags({"ratio": ratio, "advantage": advantage, "weight": weight}, 6)
    both = PPO_DROPS | KEPT
    assert flags.tolist() == [both, KEPT, KEPT, both, KEPT, PPO_DROPS | DROPPED]
    assert token_flags({"ratio": ratio}, 6).tolist() == [0] * 6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps and two evaluations; an old file without values, and one that is half written."""
    folder = tmp_path / "my run"
    folder.mkdir()
    log = RunLog(folder)
    log.samples(1, GROUPS, tokens=trained(limit=5).rows(GROUPS))
    log.samples(2, GROUPS)
    for step in (0, 2):
        better = [group(7, [[turn([1, 2], [10])]] * (1 + step // 2))]
        log.samples(step, better, kind="eval", tokens=TokenRecorder(9).rows(better))
    log.close()
    (folder / "samples" / "train_000003.parquet").write_bytes(b"PAR1 half of it")
    return folder


def test_the_page_holds_the_values_of_each_token(run: Path):
    samples = read_samples(run, 100)
    assert len(samples.attempts) == samples.total == 15 and "train_000003" in samples.notes[0]
    facts, blobs = page_data(samples, "<{}>".format)
    arrays = {b.name: np.frombuffer(base64.b64decode(b.data), np.dtype(b.dtype)) for b in blobs}
    kinds, spans, valued, ids = facts["kinds"], facts["spans"], facts["valued"], facts["vocabularyIds"]
    assert kinds == ["train", "eval"] and isinstance(spans, list) and isinstance(valued, list) and isinstance(ids, list)
    # Of the prompt of an evaluation: 0 at step 0, then the mean of 0 and 1.
    assert isinstance(change := facts["change"], list) and 0.5 in change
    place = at = 0
    for attempt, own, has in zip(samples.attempts, spans, valued, strict=True):
        for n, length in enumerate(own):
            for token in arrays["ids"][place : place + length]:
                if n % 2 == 0 and has and attempt.update is not None:
                    assert arrays["entropy"][at] == ids[token] and arrays["gap"][at] == pytest.approx(
                        -ids[token] / 100, rel=1e-3
                    )
                at += n % 2 == 0 and has
            place += length
    assert place == len(arrays["ids"]) and at == len(arrays["flags"]) == len(arrays["gap"])


def test_a_bounded_page_keeps_attempts_with_values(run: Path):
    samples = read_samples(run, 8)
    assert samples.total == 15 and len(samples.attempts) <= 8 and "--samples" in samples.notes[-1]
    first = [a for a in samples.attempts if a.kind == "train" and a.step == 1]
    assert first and all(a.update is not None for a in first)


def test_text_cannot_leave_its_script_tag():
    hostile = "</script><!--<script>\u2028"
    assert "<" not in script_json([hostile]) and json.loads(script_json([hostile])) == [hostile]


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        view(tmp_path / "none", None, limit=10)
    with pytest.raises(UserError, match="holds no samples"):
        view(tmp_path, None, limit=10)


# Clicks and keys of a user; the results land in the document that the browser prints.
ACTIONS = """
<script>
const told = {}, at = id => document.getElementById(id);
const set = (id, value, event) => { at(id).value = value; at(id).dispatchEvent(new Event(event)); };
told.all = at("count").textContent;
set("sort", "rescued", "change");
document.querySelector(".row").click();
told.outlined = document.querySelectorAll(".tokens .ppo").length;
told.tokens = [...document.querySelectorAll(".tokens .t")].map(t => t.textContent).join("");
told.read = [...document.querySelectorAll(".tokens .read")].map(t => t.textContent).join("|");
document.querySelector(".tokens .t").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
told.values = document.querySelector(".token-facts").textContent;
told.messages = [...document.querySelectorAll(".message")].map(m => m.textContent);
told.colours = [...document.querySelectorAll(".choices button")].map(b => b.textContent);
set("set", "1", "change");
told.evaluated = at("count").textContent;
document.querySelector(".row").click();
told.chart = document.querySelectorAll("svg circle").length;
set("search", "nothing like it", "input");
told.none = at("count").textContent + document.querySelector("#rows").textContent;
document.body.dataset.told = JSON.stringify(told);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert CHROMIUM is not None
    page = tmp_path / "page.html"
    view(run, page, limit=100)
    assert "15 attempts" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://", text.replace("http://www.w3.org/2000/svg", ""))
    page.write_text(text + ACTIONS, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert told["all"] == "15 of 15" and told["evaluated"] == "3 of 15"
    # The attempt of three turns: all of its ratios are above 1.2, those with A > 0 are outlined.
    assert told["outlined"] == 4 and told["tokens"] == "<20><21><22><23><24>" and told["read"] == "<4><5>|<6>"
    assert "entropy 20" in told["values"] and "logprob gap -0.2" in told["values"]
    assert (
        told["messages"][0].startswith("policy")
        and "hm" in told["messages"][0]
        and 'look({"at":3})' in told["messages"][0]
    )
    assert told["messages"][1] == "observation of looka door"
    assert told["colours"] == ["weight", "ratio", "advantage", "entropy", "logprob gap", "logprob"]
    assert told["chart"] == 3 and told["none"].startswith("0 of 15") and "No attempt matches" in told["none"]
