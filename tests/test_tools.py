"""The tools that ship: exact arithmetic, cells of Python that keep their names, and search over a folder."""

from __future__ import annotations

import asyncio
import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.agents.contract import Reply, Step, ToolCall
from cispo.agents.environment import Identity, Session, open_session, used_tools
from cispo.agents.session_pool import pool_of
from cispo.agents.tools import ToolError
from cispo.errors import UserError
from cispo.recipe.user_code import load_object
from cispo.tools.calculator import calculator
from cispo.tools.python import cut
from cispo.tools.search import Index, Passage, passages_of, search, words_of

KEY = "env.tools"


def said(session: Session, *calls: ToolCall) -> list[str]:
    step, _ = asyncio.run(session.step(Reply(text="", calls=calls)))
    assert isinstance(step, Step) and not isinstance(step.observation, str)
    return [str(message["content"]) for message in step.observation]


def of_shipped(name: str, **columns: object) -> Session:
    return asyncio.run(open_session([load_object(name, KEY)], columns, Identity(0, 0), KEY))


def test_recipes_name_them_in_short():
    names = ["tools.python:run", "tools.search:search", "tools.calculator:calculator"]
    tools = used_tools([load_object(name, KEY) for name in names], KEY)
    assert [tool.name for tool in tools] == ["python", "search", "calculator"]
    assert [sorted(tool.required_columns) for tool in tools] == [[], ["folder"], []]
    assert all(str(tool.definition).count("'description': ''") == 0 for tool in tools)


# Calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("47*86", "4042"),
        ("0.1 + 0.2", "0.3"),
        ("10/4", "2.5"),
        ("-1/8", "-0.125"),
        ("1/3", "1/3 (about 0.3333333333)"),
        ("-(2/3)", "-2/3 (about -0.6666666667)"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2^10 − 4", "1020"),
        ("3×4÷6", "2"),
        ("1.5e3", "1500"),
        ("1_000 * 2", "2000"),
        ("2**-2", "0.25"),
        ("(-1)**99999", "-1"),
        ("10**400/3", f"{10**400}/3 (about 1e399)"),
    ],
)
def test_arithmetic_is_exact(expression: str, value: str):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("", "must have 1 to 500 characters"),
        ("1" * 501, "must have 1 to 500 characters"),
        ("1 +", "is not an arithmetic expression"),
        ("(" * 400, "is not an arithmetic expression"),
        ("1\0", "is not an arithmetic expression"),
        ("1/(2-2)", "divides by zero"),
        ("0**-1", "divides by zero"),
        ("9**9**9", "the result is too large"),
        ("*".join(["10**400"] * 9), "the result is too large"),
        ("4**0.5", "exponents are whole numbers"),
        ("1e9999", "is no number"),
        ("1j", "is no number"),
        ("True", "is no number"),
        ("x + 1", "x is not arithmetic"),
        ("__import__('os')", "is not arithmetic"),
        ("[1][0]", "is not arithmetic"),
        ("1 if 1 else 2", "is not arithmetic"),
        ("1 << 9", "is not arithmetic"),
    ],
)
def test_expressions_that_are_refused(expression: str, sentence: str):
    with pytest.raises(ToolError, match=sentence):
        calculator(expression)


@given(st.text(alphabet="0123456789.+-*/%()^e _×j'a[", max_size=40))
def test_any_text_is_a_number_or_a_sentence(text: str):
    try:
        assert calculator(text).strip()
    except ToolError as error:
        assert str(error)


# Python


def cells(session: Session, *codes: str) -> list[str]:
    return [said(session, ToolCall(id="", name="python", arguments={"code": code}))[0] for code in codes]


def test_names_are_kept_by_repeating_the_cells():
    """Values, output to descriptors and random numbers: a cell shows its own alone, and the second draw is new."""
    python = of_shipped("tools.python:run")
    found = cells(
        python,
        "import os, random\nx = 5\nprint('set')",
        "x += 1; os.write(1, b'raw'); print(x)",
        "random.random()",
        "random.random()",
        "def f(n):\n    raise KeyError(n)\n",
        "y = 1\nf(x)",
        "x, y",
        "syntax error",
    )
    assert found[:2] == ["set", "raw6"] and found[2] != found[3]
    assert found[4] == "(no output)" and found[6] == "(6, 1)"
    assert found[5].splitlines()[-1] == "KeyError: 6" and '"<cell 6>", line 2, in <module>' in found[5]
    assert "cells.py" not in found[5] and found[7].endswith("SyntaxError: invalid syntax")
    again = of_shipped("tools.python:run")
    assert cells(again, "import random; random.random()") == [found[2]]


def test_a_cell_without_its_end_is_undone():
    python = of_shipped("tools.python:run", timeout=3.0, memory_mb=128)
    found = cells(
        python,
        "x = 1",
        "x = 2; print('on')\nimport time; time.sleep(60)",
        "x = 3\nimport os; os._exit(0)",
        "x",
        "bytes(1 << 30)",
    )
    assert found[1] == "on\n[stopped after 3 s, earlier cells included: the cell is undone]"
    assert found[2] == "[ended its process with exit code 0: the cell is undone]"
    assert found[3] == "1" and found[4].endswith("MemoryError")


def test_cells_of_one_reply_run_in_order():
    python = of_shipped("tools.python:run")
    codes = ["x = [0]", *["x.append(len(x)); x"] * 3]
    calls = [ToolCall(id=str(n), name="python", arguments={"code": code}) for n, code in enumerate(codes)]
    assert said(python, *calls) == ["(no output)", "[0, 1]", "[0, 1, 2]", "[0, 1, 2, 3]"]


def test_output_is_cut_in_the_middle():
    assert cut("a" * 60 + "b" * 40, 30) == "a" * 20 + "\n[70 characters were cut]\n" + "b" * 10
    assert cut("short", 30) == "short"


# Search


TEXTS = {
    "b.txt": "The lightning layers keep a state.\n\nA state is a matrix of each head.",
    "a.md": "Softmax layers keep keys and values of all tokens.",
    "deep/c.txt": "Experts are chosen by a router. " + "filler " * 200 + "the needle",
    "image.png": "a router that no text file has",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_best_passage_comes_first(folder: Path):
    assert search("what keeps a STATE?", folder=str(folder), top=1).startswith("[b.txt] The lightning")
    router = search("router", folder=str(folder))
    assert router.startswith("[deep/c.txt] Experts") and "\n\n" not in router and len(router.split()) == 121
    assert "the needle" in search("needle", folder=str(folder))
    assert search("absent", folder=str(folder)) == "nothing found"


def test_scores_are_bm25():
    """The formula, summed word by word over every passage."""
    texts = ["a b b c", "a a d", "e", "b d d e e e"]
    index = Index([Passage("", text) for text in texts])
    mean = sum(len(words_of(t)) for t in texts) / 4

    def score(query: str, text: str) -> float:
        total, words = 0.0, words_of(text)
        for word in words_of(query):
            n, f = sum(word in words_of(t) for t in texts), words.count(word)
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
        return total

    for query in ("b", "a d d", "e x"):
        found = index.scores(query)
        assert [found.get(i, 0.0) for i in range(4)] == pytest.approx([score(query, t) for t in texts])
    assert index.best("b d", 2) == sorted(range(4), key=lambda i: -score("b d", texts[i]))[:2]


def test_equal_scores_keep_the_order_of_the_files():
    index = Index([Passage(str(n), "same words") for n in range(9)])
    assert index.best("words", 3) == [0, 1, 2]


@given(st.lists(st.text(alphabet="ab \n", max_size=400), max_size=4))
def test_passages_hold_every_word_once(texts: list[str]):
    text = "\n\n".join(texts)
    passages = [p.text.split() for p in passages_of(text, "")]
    assert sum(passages, []) == text.split() and all(0 < len(p) <= 120 for p in passages)


def test_a_folder_that_is_missing_ends_the_run(tmp_path: Path):
    """It is the recipe's fault: a policy could not mend it, and would learn not to search."""

    async def ask() -> None:
        with contextlib.closing(
            pool_of(["tools.search:search"], {"folder": str(tmp_path / "no")}, KEY, timeout=5.0, workers=1)
        ) as pool:
            session = pool.open({}, Identity(0, 0))
            await session.start()
            await session.step(Reply(text="", calls=(ToolCall(id="", name="search", arguments={"query": "x"}),)))

    with pytest.raises(UserError, match=r"the folder '.*no' \(env.args.folder\) does not exist"):
        asyncio.run(ask())
    with pytest.raises(UserError, match="has no text"):
        search("x", folder=str(tmp_path))
