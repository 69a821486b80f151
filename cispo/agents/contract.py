"""The objects that an environment, a tool or an agent of the user receives and returns.

    policy --Reply--> environment.step --Step--> policy --Reply--> ... --> Status

A reply is parsed once, by the driver; an observation is text or chat messages, and is rendered by the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cispo.types import FinishReason, Message


class Status(StrEnum):
    """The end of an attempt."""

    ANSWERED = "answered"
    """The policy replied without a call, or an environment had nothing to say back."""
    DONE = "done"
    """The environment or a tool ended the episode."""
    TURNS = "turns"
    """`env.max_turns` replies were sampled."""
    CONTEXT = "context"
    """No room was left for a further reply."""
    LENGTH = "length"
    """A reply was cut at its limit: a reply without an end token cannot be continued."""
    REPETITION = "repetition"
    """The repetition stop cut a reply."""
    TIMEOUT = "timeout"
    """The environment took longer than its limit."""
    FAILED = "failed"
    """The environment raised an exception, or its process ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call in a reply.

    Example: ToolCall(id="call_0", name="calculator", arguments={"expression": "47*86"})
    """

    id: str
    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sampled turn of the policy, as text and as its parts."""

    text: str
    """The whole reply without its end token."""
    content: str = ""
    """The text without thought and calls."""
    thought: str = ""
    """The reasoning block, "" without one."""
    calls: tuple[ToolCall, ...] = ()
    problem: str = ""
    """The reason why a call could not be read, as a sentence for the policy."""
    finish_reason: FinishReason = FinishReason.STOP
    spoken: str | None = None
    """The text without its thought, calls as they were written; None where that is the text, or the content of a reply
    with a thought."""
    message: Message = field(default_factory=dict)
    """The reply as a chat message, for the next request of an agent."""
    prompt_tokens: int = 0
    """Tokens that the policy read before it, of an agent's reply."""
    tokens: int = 0
    """Sampled tokens, of an agent's reply."""

    @property
    def remembered(self) -> str:
        """The text that stays in a history without thoughts."""
        if self.spoken is not None:
            return self.spoken
        return self.content if self.thought else self.text

    @property
    def thinks(self) -> bool:
        """Whether a history without thoughts differs from the sampled text."""
        return self.remembered.strip() != self.text.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The environment's answer to a reply.

    Example: Step(observation="too low", reward={"progress": 0.1})
    """

    observation: str | Sequence[Message] = ()
    """Text is one message of role `user`."""
    reward: float | Mapping[str, float] = 0.0
    """Rewards of this turn by name; they land on its last token. A number is named "step"."""
    done: bool = False
    """Whether the episode ends here; the observation is then not shown to the policy."""
