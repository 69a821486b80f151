"""Thoughts in the history, as a recipe and its chat template have them: sentences for `cispo show`."""

from __future__ import annotations

from dataclasses import dataclass

from cispo.errors import UserError
from cispo.recipe.schema import Env
from cispo.rollout.renderer import Renderer


@dataclass(frozen=True, slots=True)
class TemplateRule:
    """Whether a chat template keeps the thought of a past reply; None where it renders no such message."""

    after_tool: bool | None
    after_user: bool | None
    exists: bool = True

    @property
    def text(self) -> str:
        """The rule as a clause."""
        if not self.exists:
            return "kept (no chat template)"
        if self.after_user is False:
            between = "dropped after every reply" if self.after_tool is False else "kept between calls"
            return f"{between}; dropped when a user message comes (template)"
        return "dropped after a call (template)" if self.after_tool is False else "kept (template)"


def rule_of(renderer: Renderer) -> TemplateRule:
    """The rule that a template shows on a conversation made up for it."""
    return TemplateRule(
        after_tool=_keeps(renderer, "tool"),
        after_user=_keeps(renderer, "user"),
        exists=renderer.tokenizer.chat_template is not None,
    )


def describe_thinking(env: Env, renderer: Renderer) -> str:
    """Thoughts of past replies, and the training sequences of an attempt, in words."""
    rule = rule_of(renderer)
    if env.thinking == "drop":
        return f"dropped from every past reply; {_sequences(env.max_turns)}"
    if env.thinking == "keep":
        own = "; an agent that rewrites its history begins another" if env.use else ""
        return f"kept, every prompt continues the one before; {_sequences(1)}{own}"
    return f"{rule.text}; {_sequences(env.max_turns if _drops(env, rule) else 1)}"


def thinking_warnings(env: Env, renderer: Renderer, *, per_sequence: bool) -> list[str]:
    """Departures from the template, and a ratio that sees segments; `per_sequence`: the objective is GSPO's."""
    rule, sentences = rule_of(renderer), list[str]()
    if env.thinking == "keep" and _drops(env, rule):
        when = "when a user message comes" if env.use else "after a call"
        sentences.append(
            f"env.thinking keep departs from the chat template, which drops thoughts {when}: the policy reads "
            "histories that it may not know from its earlier training (env.thinking: template follows it)"
        )
    cuts = env.thinking == "drop" or (env.thinking == "template" and _drops(env, rule)) or env.use is not None
    if per_sequence and cuts:
        sentences.append(
            "gspo forms its ratio over a segment, the tokens between two rewritings of the history, and not over the "
            "attempt"
        )
    return sentences


def _drops(env: Env, rule: TemplateRule) -> bool:
    """Whether the template drops thoughts at the messages that answer a reply."""
    return (rule.after_user if env.use else rule.after_tool) is False


def _sequences(number: int) -> str:
    return "one sequence an attempt" if number == 1 else f"up to {number} sequences an attempt"


def _keeps(renderer: Renderer, role: str) -> bool | None:
    try:
        return renderer.keeps_thought([{"role": role, "content": "?"}])
    except UserError:
        return None
