"""Wrong values of the keys of data and evaluation: one sentence that names the key or row, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cispo import cli
from tests.bad_inputs import ROW, Maker, override, recipe, rows, tokenizer

SORTING = "{source: 'rewards.sorting:problems', args: {size: 4, seed: 0, count: 2}"
TWO = f"[{SORTING}, name: a}}, {SORTING}, name: b}}]"
LONG = '{"prompt": "' + "1" * 40 + '>", "answer": "1"}\n'


def sources(text: str, *items: str) -> Maker:
    """Training on several sources, or a wrong list of them."""

    def make() -> list[str]:
        return ["train", recipe(data=None), f"data={{sources: {text}}}", *items]

    return make


def held_out(text: str, *items: str) -> Maker:
    def make() -> list[str]:
        return ["train", recipe(eval=None), f"eval={text}", *items]

    return make


def several_rows() -> list[str]:
    Path("a.jsonl").write_text(ROW)
    Path("b.jsonl").write_text('{"prompt": "1>"}\n')
    listed = "[{name: a, source: a.jsonl}, {name: b, source: b.jsonl}]"
    return ["train", recipe(data=None), f"data={{sources: {listed}}}"]


def unlike_runs() -> list[str]:
    Path("empty").mkdir()
    return ["evaluate", "empty"]


def fewer_checkpoints() -> list[str]:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(Path(recipe()).read_text())
    return ["evaluate", "run"]


CASES: dict[str, tuple[Maker, str]] = {
    "config of a file": (rows(ROW, config="main"), "data.config is 'main', but only folders and hub datasets"),
    "config of a function": (override("data.config=main"), "data.config is 'main', but only folders and hub"),
    "config that is no text": (override("data.config=[1]"), "data.config"),
    "overlong of another value": (override("data.overlong=skip"), "data.overlong = 'skip'"),
    "every row too long": (rows(LONG, overlong="drop"), "data: all 1 rows are too long"),
    "one row too long": (rows(ROW + LONG), "data: 1 of 2 rows are too long"),
    "system of a number": (rows(ROW, system=["a"]), "data.system = ['a']"),
    "template arguments that are no mapping": (override("data.template_args=3"), "data.template_args = 3"),
    "template arguments without a template": (override("data.template_args={enable_thinking: false}"), "template"),
    "template argument misspelt": (
        lambda: [*tokenizer({}, chat_template="{{ messages }}{{ thinking }}")(), "data.template_args={thinkin: false}"],
        "has no variable 'thinkin'",
    ),
    "column of nothing": (rows(ROW, columns={"answer": "{solution}"}), "row 0 has no column 'solution'"),
    "columns that are no texts": (override("data.columns={answer: 3}"), "data.columns.answer = 3"),
    "no source": (sources("[]"), "key data.source is missing"),
    "source without a name": (sources(f"[{SORTING}}}]"), "data.sources.0.name is missing"),
    "source twice": (sources(f"[{SORTING}, name: a}}, {SORTING}, name: a}}]"), "data.sources: two are named 'a'"),
    "source of weight 0": (sources(f"[{SORTING}, name: a, weight: 0}}]"), "data.sources.0.weight = 0"),
    "name that is no name": (sources(f"[{SORTING}, name: 'a/b'}}]"), "data.sources.0.name = 'a/b'"),
    "source beside sources": (override(f"data.sources={TWO}", "data.source=a.jsonl"), "data.source belongs to one"),
    "columns of one source": (several_rows, "row 1 of data has prompt"),
    "reward of no source": (
        sources(TWO, "reward.functions=[{fn: 'rewards.exact:exact_match', sources: [c]}]"),
        "reward.functions.0.sources: 'c' is no name",
    ),
    "source without a reward": (
        sources(TWO, "reward.functions=[{fn: 'rewards.exact:exact_match', sources: [a]}]", "eval=null"),
        "no function applies to the source 'b'",
    ),
    "set without a name": (held_out(f"[{SORTING}}}]"), "key eval.0.name is missing"),
    "set twice": (held_out(f"[{SORTING}, name: a}}, {SORTING}, name: a}}]"), "eval: two are named 'a'"),
    "no set": (held_out("[]"), "eval = []"),
    "set that is no mapping": (held_out("[3]"), "eval.0 = 3"),
    "sets of text": (held_out("abc"), "eval = 'abc'"),
    "set of no source": (held_out("[{name: a}]"), "key eval.0.source is missing"),
    "set with a wrong key": (held_out(f"[{SORTING}, name: a, sample: 2}}]"), "unknown key eval.0.sample"),
    "samples of 0": (override("eval.samples=0"), "eval.samples = 0"),
    "temperature below 0": (override("eval.temperature=-1"), "eval.temperature = -1"),
    "top_p of 0": (override("eval.top_p=0"), "eval.top_p = 0"),
    "top_p above 1": (override("eval.top_p=1.5"), "eval.top_p = 1.5"),
    "longest completion beyond the context": (override("eval.max_tokens=32"), "eval.max_tokens 32 leaves no room"),
    "answer that is no function": (override("eval.answer=os:sep"), "eval.answer: 'os:sep' is not a function"),
    "answer that is not there": (override("eval.answer=rewards.math:lost"), "eval.answer: 'rewards.math:lost'"),
    "answer without a name": (override("eval.answer=math"), "eval.answer: 'math' is not of the form module:name"),
    "best of no metric": (override("train.best=eval/acuracy"), "train.best: no evaluation of this recipe gives"),
    "best of other samples": (override("train.best=eval/pass@8"), "did you mean eval/"),
    "run without a recipe": (unlike_runs, "empty is no run folder"),
    "run without a checkpoint": (fewer_checkpoints, "run has no whole checkpoint"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_value_is_one_sentence(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make, expected = CASES[name]
    monkeypatch.setattr(sys, "argv", ["cispo", *make()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capfd.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("cispo: ")]
    assert ended.value.code == 2 and len(said) == 1 and "Traceback" not in captured.err + captured.out
    assert expected in said[0] and len(said[0]) < 500, said[0]
    assert not (tmp_path / "runs").exists()
