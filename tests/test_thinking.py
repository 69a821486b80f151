"""Thoughts in the history: chat templates of many kinds, their rule in words, and the weights of segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cispo.agents.ledger import Ledger
from cispo.agents.parsing import compact
from cispo.agents.thinking import describe_thinking, thinking_warnings
from cispo.errors import UserError
from cispo.recipe.schema import Env
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, FinishReason, Message
from tests.test_agents_chat import THINKS
from tests.test_episodes import CHARS, CHATML, FORGETFUL

MARKS = {"user": "<|user|>", "tool": "<|tool|>", "assistant": "<|assistant|>"}
# No whole call: a client that gives neither its text nor its fields back has another history.
LETTERS = st.text(st.sampled_from("abc []\n0,"), min_size=1, max_size=6).filter(
    lambda text: text == text.strip() and not compact(text, []).calls
)


@dataclass(frozen=True)
class Kind:
    """A chat template, and the policy's habits under it."""

    closing: str
    """Behind every message; "": a message ends where the mark of the next role begins, which is then the stop token."""
    gap: str
    """Between a role's mark and the content."""
    think: str
    """none: the field is not read; always: shown in every reply; last: shown behind the last user message, where a
    reply without a thought gets an empty block."""
    opened: bool
    """Whether the generation prompt opens the thought."""

    @property
    def template(self) -> str:
        block = "<think>\n{{ m.get('reasoning_content') or '' }}\n</think>\n\n"
        shown = {
            "none": "",
            "always": "{% if m.get('reasoning_content') %}" + block + "{% endif %}",
            "last": "{% if loop.index0 > ns.last %}" + block + "{% endif %}",
        }[self.think]
        return (
            "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
            "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|{{ m['role'] }}|>"
            + self.gap
            + "{% if m['role'] == 'assistant' %}"
            + shown
            + "{% endif %}{{ m['content'] }}"
            + self.closing
            + "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
            + self.gap
            + ("<think>\n" if self.opened else "")
            + "{% endif %}"
        )

    @property
    def stops(self) -> list[str]:
        """Texts of the tokens that end a reply."""
        return ["<eos>", "<|end|>"] if self.closing else [MARKS["user"], MARKS["tool"], "<eos>"]

    def between(self, stop: str, observed: Message) -> str:
        """The text between a sampled end and the next reply."""
        mark = MARKS[str(observed["role"])]
        said = f"{mark}{self.gap}{observed['content']}{self.closing}<|assistant|>{self.gap}"
        closed = self.closing if self.closing else ""
        text = (closed + said).removeprefix(stop) if (closed + said).startswith(stop) else closed + said
        return text + ("<think>\n" if self.opened else "")


KINDS = st.builds(
    Kind,
    closing=st.sampled_from(["<eos>", "<eos>\n", "<|end|>\n", ""]),
    gap=st.sampled_from(["", "\n"]),
    think=st.sampled_from(["none", "always", "last"]),
    opened=st.booleans(),
)


@pytest.fixture(scope="module")
def marked() -> Renderer:
    """The character tokenizer with marks of roles."""
    tokenizer = load_tokenizer(CHARS)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS.values(), "<|end|>"]})  # type: ignore[dict-item]
    return Renderer(tokenizer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, data=st.data())
def test_keep_appends_under_every_template(marked: Renderer, kind: Kind, data: st.DataObject):
    """prompt(k+1) = prompt(k) + completion(k) + the template's own text behind the end that was sampled."""
    tokenizer = marked.tokenizer
    tokenizer.chat_template = kind.template

    def id_of(token: str) -> int:
        found = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    renderer = Renderer(tokenizer)
    renderer.eos_ids = tuple(map(id_of, kind.stops))
    ledger = Ledger(renderer)
    messages: list[Message] = [{"role": "user", "content": data.draw(LETTERS)}]
    place = ledger.place(messages)
    assert place.ids == tuple(renderer.render(messages))
    for _ in range(data.draw(st.integers(1, 4))):
        thought, content = data.draw(st.sampled_from(["", "t"])), data.draw(LETTERS)
        start = "" if kind.opened else "<think>\n"
        text = f"{start}{thought}\n</think>\n\n{content}" if thought or kind.opened else content
        stop = data.draw(st.sampled_from(kind.stops))
        ids = (*renderer.encode_text(text), id_of(stop))
        said = Completion(
            token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason=FinishReason.STOP, versions=(1,) * len(ids)
        )
        reply = compact(renderer.decode(ids), [])
        ledger.record(place, said, reply)
        observed: Message = {"role": data.draw(st.sampled_from(["user", "tool"])), "content": data.draw(LETTERS)}
        messages = [*messages, {"role": "assistant", "content": reply.content}, observed]
        following = ledger.place(messages)
        assert following.ids[: len(place.ids) + len(ids)] == (*place.ids, *ids)
        written = tokenizer.decode(list(following.ids[len(place.ids) + len(ids) :]), skip_special_tokens=False)
        assert written == kind.between(stop, observed)
        place = following
    assert len(ledger.segments()) == 1


def test_a_template_that_hides_the_policy_s_turn_is_refused(marked: Renderer):
    """Two ways: its text is missing once messages follow, and nothing ends it."""
    endless = CHATML.replace("<eos>\n", "\n")
    for template in (FORGETFUL, endless):
        marked.tokenizer.chat_template = template
        with pytest.raises(UserError, match="does not continue a conversation"):
            Renderer(marked.tokenizer).extend([{"role": "user", "content": "x<eos>"}], (2,))


USE: dict[str, Any] = {"use": "my:Env", "max_turns": 6}
CALLS: dict[str, Any] = {"tools": ["my:tool"], "max_turns": 6}


@pytest.mark.parametrize(
    ("template", "env", "text", "warnings"),
    [
        (None, USE, "kept, every prompt continues the one before; one sequence an attempt; an agent that", 0),
        (None, {**USE, "thinking": "template"}, "kept (no chat template); one sequence an attempt", 0),
        (None, {**USE, "thinking": "drop"}, "dropped from every past reply; up to 6 sequences an attempt", 0),
        (CHATML, {**USE, "thinking": "template"}, "kept (template); one sequence an attempt", 0),
        (THINKS, CALLS, "kept, every prompt continues the one before; one sequence an attempt", 0),
        (THINKS, USE, "kept, every prompt continues the one before; one sequence an attempt", 1),
        (
            THINKS,
            {**USE, "thinking": "template"},
            "kept between calls; dropped when a user message comes (template); up to 6 sequences an attempt",
            0,
        ),
        (
            THINKS,
            {**CALLS, "thinking": "template"},
            "kept between calls; dropped when a user message comes (template); one sequence an attempt",
            0,
        ),
    ],
)
def test_show_says_the_rule_of_the_template(template: str | None, env: dict[str, Any], text: str, warnings: int):
    renderer = Renderer(load_tokenizer(CHARS))
    renderer.tokenizer.chat_template = template
    section = Env.model_validate(env)
    assert describe_thinking(section, renderer).startswith(text)
    found = thinking_warnings(section, renderer, per_sequence=False)
    assert len(found) == warnings and all("keep departs from the chat template" in sentence for sentence in found)
    cut = section.use is not None or "up to" in text
    assert len(thinking_warnings(section, renderer, per_sequence=True)) == warnings + cut
