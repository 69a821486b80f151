"""The page: complete, one file, nothing fetched, nothing executed, and the same numbers as results.json."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cispo.compare.comparison import ArmResult, Comparison, RunResult, summarise
from cispo.compare.report import amount, dropped_tokens, duration, summary_lines, visible, write_report
from cispo.compare.results import assert_equal, results

EVIL = "<script>alert(1)</script> $x [bold]"
VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Tags must close in order; collects text, tags and addresses."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def run(seed: int, final: float, *, failure: str | None = None, steps: int = 8) -> RunResult:
    rng = np.random.default_rng([seed, int(final * 1000)])
    history = []
    for step in range(steps + 1):
        totals = {"total/completions": step * 64, "total/tokens": step * 700, "total/seconds": step * 1.5}
        row = {"step": step, "total/updates": step, **totals}
        row["eval/accuracy"] = float(np.round(0.3 + (final - 0.3) * (1 - np.exp(-step)) + rng.normal(0, 0.003), 4))
        if step:
            row |= {
                "reward/mean": 0.5,
                "entropy": 1 / step,
                "mismatch/kl_k3": 10.0 ** -(step % 4 + 5),
                "grad_norm": 1.0,
            }
        history.append(row)
    token = {"token": " Wait\n", "count": 50, "kept": 40, "ppo_dropped_posadv": 7, "ppo_dropped_negadv": 2}
    rows = [token | {"dapo_dropped_posadv": 5, "dapo_dropped_negadv": 2}]
    rows.append({name: EVIL if name == "token" else 1 for name in rows[0]})
    return RunResult(seed=seed, history=history, failure=failure, seconds=12.0, dropped_tokens=rows)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    words = [("loss", "the weight is capped at 5"), ("note", EVIL)]
    return Comparison(
        name="quick <b>", metric="eval/accuracy", seeds=[0, 1, 2], command="cispo compare r.yaml --seeds 3",
        machine="2 cores", notes=["all start from one policy"],
        arms=[
            ArmResult(name="grpo", words=words, runs=[run(s, 0.6) for s in range(3)]),
            ArmResult(name=EVIL, words=words, runs=[run(s, 0.9) for s in range(3)]),
            ArmResult(name="ppo", runs=[run(0, 0.5), run(1, 0.5), run(2, 0.5, failure="loss not finite", steps=3)]),
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = write_report(comparison, tmp_path_factory.mktemp("report") / "new", fit=True)
    assert files.curves.read_bytes()[:4] == files.diagnostics.read_bytes()[:4] == b"\x89PNG"
    return files.page


def test_the_page_is_one_well_formed_file(written: Path):
    source = written.read_text()
    page = Page(source)
    assert "script" not in page.tags and "iframe" not in page.tags and "link" not in page.tags
    assert len(page.addresses) == 8 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not re.search(r"url\(|@import|https?://", source)


def test_names_and_tokens_cannot_become_markup(written: Path):
    source = written.read_text()
    assert "<script" not in source and "<b>" not in source
    assert Page(source).text.count(EVIL) > 5, "and they are still shown as they are"


def test_the_page_says_what_was_found(written: Path, comparison: Comparison):
    summary, text = summarise(comparison), " ".join(Page(written.read_text()).text.split())
    assert "is better" in summary.verdicts[0]
    order = [
        *summary.verdicts, *summary.remarks, "not adjusted for comparing 2 pairs", "over sampled tokens",
        "interquartile mean", "Differences, seed by seed", "Diagnostics", "Tokens that PPO would have dropped",
        "Where more compute would lead", "The algorithms", "What was run", "cispo compare r.yaml --seeds 3",
        "all start from one policy", "A run collapsed if", "75% with 3",
    ]  # fmt: skip
    places = [text.index(sentence) for sentence in order]
    assert places == sorted(places)
    assert "failed: loss not finite" in text and "1 with an error" in text
    assert "␣Wait\\n1501202161" in text.replace(" ", ""), "counts are summed over the seeds"


def test_results_are_what_a_later_run_is_held_against(written: Path, comparison: Comparison):
    stored = json.loads(written.with_name("results.json").read_text())
    assert assert_equal(results(summarise(comparison)), stored) == []
    stored["arms"]["grpo"]["seeds"]["1"]["best"] += 1e-9
    stored["arms"].pop("ppo")
    lines = assert_equal(results(summarise(comparison)), stored)
    assert len(lines) == 2 and "grpo, seed 1: best is " in lines[0] and lines[1] == "arm 'ppo' is not stored"


def test_the_same_data_make_the_same_page(written: Path, comparison: Comparison, tmp_path: Path):
    assert write_report(comparison, tmp_path, fit=True).page.read_text() == written.read_text()


def test_one_arm_one_seed_nothing_trained(tmp_path: Path):
    only = ArmResult(name="cispo", runs=[RunResult(seed=0, history=run(0, 0.9).history[:1], seconds=1.0)])
    lone = Comparison(name="x", metric="eval/accuracy", arms=[only], seeds=[0], command="c", machine="m")
    text = Page(write_report(lone, tmp_path, fit=True).page.read_text()).text
    assert "there is no other arm" in text and "no curve was fitted" in text and "Differences, seed" not in text


def test_the_terminal(comparison: Comparison):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in summary_lines(comparison):
        console.print(line)
    text = console.export_text()
    assert EVIL in text and "is better" in text and "1 of 3" in text and "ppo failed in 1 of 3 seeds" in text


def test_small_texts():
    assert visible(" a\n\t\u202e\\") == "␣a\\n\\t\\u202e\\\\" and visible("") == "(empty)" and visible("日é") == "日é"
    assert [amount(v) for v in (0, 950, 12_345, 999_600, 1_234_567)] == ["0", "950", "12.3 k", "1000 k", "1.23 M"]
    assert [duration(v) for v in (9.96, 179, 600, 20_000)] == ["10.0 s", "179.0 s", "10.0 min", "5.6 h"]


def test_top_tokens_by_what_ppo_drops():
    names = ("count", "kept", "ppo_dropped_posadv", "ppo_dropped_negadv", "dapo_dropped_posadv", "dapo_dropped_negadv")
    rows = [{"token": str(i), "id": i, **dict.fromkeys(names, i)} for i in range(40)]
    runs = [RunResult(seed=s, history=[], seconds=1.0, dropped_tokens=rows) for s in range(2)]
    top = dropped_tokens(ArmResult(name="a", runs=runs))
    assert [row["token"] for row in top] == [str(i) for i in range(39, 24, -1)] and top[0]["count"] == 78
