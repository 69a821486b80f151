"""Tokenizing and rendering: the shipped character tokenizer, chat templates, end-of-sequence tokens."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.errors import UserError
from cispo.recipe.schema import Policy, Recipe
from cispo.rollout.renderer import Renderer, load_tokenizer, renderer_of
from cispo.rollout.template import render_bounded

ROOT = Path(__file__).parents[1]
CHARS = ROOT / "recipes" / "tokenizers" / "chars"
TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<eos>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bos>me:{% endif %}"
printable = st.text(st.sampled_from("\t\n" + "".join(map(chr, range(32, 127)))))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def variant(folder: Path, changes: dict[str, object], post_processor: object = None, **files: object) -> Renderer:
    """The character tokenizer with changes to its config, a post-processor, and more JSON files beside it."""
    shutil.copytree(CHARS, folder)
    settings = {**json.loads((CHARS / "tokenizer_config.json").read_text()), **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if post_processor is not None:
        tokenizer = json.loads((CHARS / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": post_processor}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Renderer(load_tokenizer(folder))


@given(text=printable)
def test_every_printable_text_survives(renderer: Renderer, text: str) -> None:
    text = text.replace("<", "")  # the name of a special token is read as that token
    ids = renderer.render([{"role": "user", "content": text}])
    assert len(ids) == len(text)
    assert renderer.decode(ids) == text


@given(parts=st.lists(st.sampled_from(["2", ",", " ", "\n", "\u00e9", "\u6f22", "<eos>", "<bos>", "<pad>", "<unk>"])))
def test_texts_are_tokenised_as_transformers_does(renderer: Renderer, parts: list[str]) -> None:
    """The tokenizer of tokenizer.json is asked itself."""
    text = "".join(parts)
    assert renderer.encode_text(text) == renderer.tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_cuts_or_fills_texts_is_asked_through_transformers(tmp_path: Path) -> None:
    cut = json.loads((CHARS / "tokenizer.json").read_text())
    cut["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    shutil.copytree(CHARS, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text(json.dumps(cut))
    assert len(Renderer(load_tokenizer(tmp_path / "cut")).encode_text("1,2,3,4,5")) == 9


def test_ids_are_what_the_script_says(renderer: Renderer, tmp_path: Path) -> None:
    assert renderer.render([{"role": "user", "content": "\t\n 2,1>~"}]) == [4, 5, 6, 24, 18, 23, 36, 100]
    assert len(renderer.tokenizer) == 101
    assert renderer.eos_ids == (2,)
    assert renderer.decode([24, 2, 0, 1, 23]) == "21"
    assert renderer.render([{"role": "user", "content": "\u00e9"}]) == [3]
    script = ROOT / "scripts" / "make_char_tokenizer.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=600)
    for file in CHARS.iterdir():
        assert file.read_text() == (tmp_path / file.name).read_text(), f"{file.name} is not what the script makes"


def test_auto_tokenizer_reads_the_same(renderer: Renderer) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(CHARS))
    text = "47,03> is  not, don't ."
    assert auto.encode(text) == renderer.render([{"role": "user", "content": text}])
    assert auto.decode(auto.encode(text)) == text


def test_contents_are_joined_where_there_is_no_template(renderer: Renderer) -> None:
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    assert renderer.decode(renderer.render(messages)) == "abc"
    with pytest.raises(UserError, match="holds list where a tokenizer without chat template needs text"):
        renderer.render([{"role": "user", "content": [{"type": "text", "text": "a"}]}])


def test_demonstrations_end_with_eos(renderer: Renderer) -> None:
    prompt, completion = renderer.render_demonstration([{"role": "user", "content": "2,1>"}], "1,2")
    assert prompt == renderer.render([{"role": "user", "content": "2,1>"}])
    assert completion == [23, 18, 24, 2]


def test_chat_template(tmp_path: Path) -> None:
    renderer = variant(tmp_path / "t", {"chat_template": TEMPLATE})
    messages = [{"role": "s", "content": "a"}, {"role": "u", "content": "b"}]
    ids = renderer.render(messages)
    assert renderer.tokenizer.decode(ids) == "<bos>s:a<eos><bos>u:b<eos><bos>me:"
    assert ids.count(1) == 3 and ids.count(2) == 2, "special tokens are single ids"
    assert renderer.render_demonstration(messages, "c") == (ids, [73, 2])
    refusing = variant(tmp_path / "r", {"chat_template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(UserError, match="refuses a prompt: roles must alternate"):
        refusing.render(messages)


def test_bos_only_where_the_tokenizer_adds_it(tmp_path: Path, renderer: Renderer) -> None:
    content = [{"role": "user", "content": "a"}]
    assert renderer.render(content) == [71]
    adds_bos = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    with_bos = variant(tmp_path / "b", {}, adds_bos)
    assert with_bos.render(content) == [1, 71]
    assert with_bos.render_demonstration(content, "a") == ([1, 71], [71, 2])
    templated = variant(tmp_path / "t", {"chat_template": TEMPLATE}, adds_bos)
    assert templated.render(content)[:2] == [1, templated.tokenizer.encode("u", add_special_tokens=False)[0]]


def test_all_eos_ids_are_found(tmp_path: Path) -> None:
    assert variant(tmp_path / "a", {}, generation_config={"eos_token_id": [1, 2]}).eos_ids == (2, 1)
    assert variant(tmp_path / "b", {}, generation_config={"eos_token_id": 3}).eos_ids == (2, 3)
    assert variant(tmp_path / "c", {}, generation_config={"temperature": 1.0}).eos_ids == (2,)
    assert variant(tmp_path / "d", {}, generation_config={"eos_token_id": [-1, True, "x", 5]}).eos_ids == (2, 5)


def test_ends_are_those_of_the_model_whatever_it_is_called(tmp_path: Path) -> None:
    """In a folder, beside a tokenizer from another folder, and on the hub by its name."""
    variant(tmp_path / "model", {}, generation_config={"eos_token_id": [1, 2]}, config={"model_type": "llama"})
    assert renderer_of(Recipe(policy=Policy(model=str(tmp_path / "model")))).eos_ids == (2, 1)
    of_both = renderer_of(Recipe(policy=Policy(model=str(tmp_path / "model"), tokenizer=str(CHARS))))
    assert of_both.eos_ids == (2, 1)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "model", snapshot)
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text("abc")
    code = (
        "from cispo.recipe.schema import Policy, Recipe; from cispo.rollout.renderer import renderer_of;"
        "print(renderer_of(Recipe(policy=Policy(model='owner/name'))).eos_ids)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 1)", done.stderr


def test_ends_in_config_json_count_where_they_are_a_list(tmp_path: Path) -> None:
    assert variant(tmp_path / "a", {}, config={"eos_token_id": [2, 5]}).eos_ids == (2, 5)
    assert variant(tmp_path / "b", {}, config={"eos_token_id": 5}).eos_ids == (2,), "the default of a model's class"
    both = variant(tmp_path / "c", {}, config={"eos_token_id": [5]}, generation_config={"eos_token_id": 1})
    assert both.eos_ids == (2, 1)


def test_a_saved_folder_renders_and_ends_alike(tmp_path: Path) -> None:
    generation = {"eos_token_id": [1], "temperature": 0.6}
    renderer = variant(tmp_path / "t", {"chat_template": TEMPLATE, "pad_token": "<pad>"}, generation_config=generation)
    renderer.save(tmp_path / "saved")
    again, messages = Renderer(load_tokenizer(tmp_path / "saved")), [{"role": "u", "content": "b"}]
    assert again.eos_ids == renderer.eos_ids == (2, 1) and again.render(messages) == renderer.render(messages)
    assert again.tokenizer.special_tokens_map == renderer.tokenizer.special_tokens_map
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "pad_token_id": 0, "temperature": 0.6, "eos_token_id": [2, 1]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 1 / 0 }}", "fails on a prompt: ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "fails on a prompt: TypeError: can only concatenate str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on a prompt: RecursionError"),
        ("{{ raise_exception('no') }}", "refuses a prompt: no"),
        ("{% if %}", "refuses a prompt: Expected an expression"),
        ("{{ ('a' * 1000000) * 100000 }}", "takes more than 2 GiB of memory"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "does not finish within 0.5 s",
        ),
        ("{{ messages }}", "fails on a prompt: TypeError: it takes the content of a message for text"),
    ],
    ids=["raises", "wrong type", "recursion", "refuses", "syntax", "gigabytes", "endless", "parts"],
)
def test_a_template_that_fails_loops_or_explodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, sentence: str
) -> None:
    monkeypatch.setattr("cispo.rollout.template._SECONDS", 0.5)
    renderer = variant(tmp_path / "t", {"chat_template": template})
    content = [{"type": "text", "text": "a"}] if template == "{{ messages }}" else "a"
    with pytest.raises(UserError) as raised:
        renderer.texts([[{"role": "user", "content": content}]], 1000, "data: row")
    assert str(raised.value).startswith(f"data: row 0: the chat template of '{tmp_path / 't'}' {sentence}")
    assert "\n" not in str(raised.value)


def test_texts_are_those_of_render_and_long_ones_are_left_out(tmp_path: Path, renderer: Renderer) -> None:
    templated = variant(tmp_path / "t", {"chat_template": TEMPLATE})
    conversations = [[{"role": "u", "content": text}] for text in ("a", "b" * 100, "c")]
    for one in (templated, renderer):
        texts = one.texts(conversations, 1000, "data: row")
        assert [one.encode_prompt(str(text)) for text in texts] == [one.render(messages) for messages in conversations]
    assert [text is None for text in templated.texts(conversations, 60, "data: row")] == [False, True, False]
    with pytest.raises(UserError, match="half of a character"):
        renderer.render([{"role": "u", "content": "\ud800"}])


def rendered_as(renders: Callable[[str], str], contents: Sequence[str], longest: int = 1000) -> list[str | None]:
    """The texts of conversations of one message each, of the rows 100, 101 ..."""
    return render_bounded(
        lambda messages: renders(str(messages[0]["content"])),
        [[{"role": "u", "content": content}] for content in contents],
        longest=longest,
        name="t",
        where="data: row",
        numbers=range(100, 100 + len(contents)),
    )


def test_a_conversation_within_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts cross in batches, of a tenth of a second or a million characters; the row at fault is the eighth."""
    contents = [f"{number}" for number in range(20)]
    faults: dict[str, Callable[[], object]] = {
        "fails on a prompt: ZeroDivisionError": lambda: 1 // 0,
        "crashes its process": lambda: os._exit(3),
        "does not finish within 2 s": lambda: time.sleep(60),
    }
    monkeypatch.setattr("cispo.rollout.template._SECONDS", 2.0)
    for length in (1, 400_000):  # all in one batch, and three in each
        for sentence, fault in faults.items():

            def renders(content: str, length: int = length, fault: Callable[[], object] = fault) -> str:
                return content * length if content != "7" else str(fault())

            with pytest.raises(UserError) as raised:
                rendered_as(renders, contents, longest=10**6)
            assert str(raised.value).startswith(f"data: row 107: the chat template of 't' {sentence}")


def test_a_crash_behind_the_last_text_is_the_last_conversation_s() -> None:
    def renders(content: str) -> str:
        Connection.send = lambda self, obj: os._exit(3)  # in the process of the template alone
        return content

    with pytest.raises(UserError, match="^data: row 102: the chat template of 't' crashes its process$"):
        rendered_as(renders, list("abc"))


def test_the_limit_of_seconds_is_one_conversation_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cispo.rollout.template._SECONDS", 2.0)

    def slowly(content: str) -> str:
        time.sleep(1.2)
        return content

    assert rendered_as(slowly, list("abc")) == list("abc")


def test_batches_of_texts_are_all_of_them_in_order() -> None:
    contents = ["a", "b" * 3, "c", "d" * 2, "", "e"]
    texts = rendered_as(lambda content: content * 600_000, contents, longest=1_200_000)
    assert texts == [None if len(content) == 3 else content * 600_000 for content in contents]
    assert rendered_as(str, []) == []


def test_texts_are_tokenised_in_batches_as_one_by_one(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["1,2>", "", "<eos>3", "é", "4", "5" * 30, "a\nb", "<bos>", "6", "7,8"]
    cut = {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    tokenizer = json.loads((CHARS / "tokenizer.json").read_text())
    cutting = variant(tmp_path / "cut", {}, tokenizer={**tokenizer, **cut})
    templated = variant(tmp_path / "t", {"chat_template": TEMPLATE})
    for characters in (1, 8, 10**6):
        monkeypatch.setattr("cispo.rollout.encoding._BATCH_CHARACTERS", characters)
        monkeypatch.setattr("cispo.rollout.encoding._BATCH", 3)
        for one in (renderer, cutting, templated):
            one._encoder.highest_id = 0
            singly = [one.encode_prompt(text) for text in texts]
            highest, one._encoder.highest_id = one.highest_id, 0
            assert one.encode_prompts(texts) == singly
            assert one.highest_id == highest > 0
            assert one.encode_completions(texts) == [one.encode_completion(text) for text in texts]
            assert one.encode_prompts([]) == []
            with pytest.raises(UserError, match=r"a text holds '\\ud800', half of a character"):
                one.encode_prompts([*texts, "a\ud800", "\ud801"])


def in_a_daemon(template: str, folder: Path, sending: Connection) -> None:
    """In a daemonic process: sends a conversation's texts; a sign first, where the template has no end."""
    renderer = variant(folder, {"chat_template": template})
    if template != TEMPLATE:
        sending.send(None)
    sending.send(renderer.texts([[{"role": "u", "content": "a"}]], 1000, "data: row"))


def test_a_daemonic_process_renders_and_leaves_no_orphan(tmp_path: Path) -> None:
    """`multiprocessing` forbids such a process, a pool's worker for one, to start a `Process`."""
    context = multiprocessing.get_context("fork")

    def started(template: str, name: str) -> tuple[BaseProcess, Connection]:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=in_a_daemon, args=(template, tmp_path / name, sending), daemon=True)
        process.start()
        return process, receiving

    process, receiving = started(TEMPLATE, "t")
    assert receiving.poll(20) and receiving.recv() == ["<bos>u:a<eos><bos>me:"]
    process.join()

    process, receiving = started("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "e")
    assert receiving.poll(20) and receiving.recv() is None
    children = psutil.Process(process.pid).children
    while not (found := children()):
        time.sleep(0.01)
    process.kill()
    process.join()
    gone, alive = psutil.wait_procs(found, timeout=5)
    assert gone and not alive


def test_bad_tokenizers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"the tokenizer of '{tmp_path / 'e'}' has no eos token"):
        variant(tmp_path / "e", {"eos_token": None})
    with pytest.raises(UserError, match="the tokenizer folder '.*missing' does not exist"):
        load_tokenizer(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="the tokenizer folder 'models/missing' does not exist"):
        load_tokenizer("models/missing")
    with pytest.raises(UserError, match="the tokenizer folder 'models' holds no tokenizer.json"):
        load_tokenizer("models")
    shutil.copytree(CHARS, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="cannot load the tokenizer of '.*broken'"):
        load_tokenizer(tmp_path / "broken")
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copytree(CHARS, tmp_path / name)
        (tmp_path / name / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(UserError, match=f"{name}' is not a regular file"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "broken" / "tokenizer_config.json").write_text("[" * 30_000)
    with pytest.raises(UserError, match="tokenizer_config.json' is not JSON"):
        load_tokenizer(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json' is not JSON"):
        load_tokenizer(tmp_path / "broken")
