"""One attempt in progress: its conversation, turns, rewards and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cispo.agents.contract import Reply, Status
from cispo.agents.conversations import Conversations
from cispo.agents.ledger import Ledger, Place
from cispo.agents.session_pool import RemoteSession
from cispo.types import Completion, Message, Prompt, Turn


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt in progress."""

    prompt: Prompt
    number: int
    """Of the batch."""
    index: int
    """Of the group."""
    session: RemoteSession
    ledger: Ledger
    place: Place
    """Prompt of the next turn."""
    history: list[Message]
    """The conversation as the chat template takes it, from the prompt on."""
    replies: list[Reply | None]
    """For each message of the history the reply that it is."""
    messages: list[Message] = field(default_factory=list)
    """The conversation after the prompt, for logs and rewards."""
    rewards: dict[int, dict[str, float]] = field(default_factory=dict)
    """By turn and name; an agent's are all of its last turn."""
    events: dict[str, int] = field(default_factory=lambda: {"calls": 0, "failed": 0, "unreadable": 0})
    status: Status | None = None
    problem: str = ""
    """The error of user code that ended it."""
    conversations: Conversations | None = None
    """Of an agent."""
    key: str = ""
    """Of an agent with a client of OpenAI's API."""

    def hear(self, completion: Completion, reply: Reply) -> None:
        """Takes the policy's reply as a turn."""
        self.ledger.record(self.place, completion, reply)
        self.messages.append(_said(reply))
        self.history.append(reply.message)
        self.replies.append(reply)

    def observe(self, observed: Sequence[Message]) -> None:
        """Takes messages for the policy."""
        self.messages += observed
        self.history += observed
        self.replies += [None] * len(observed)

    def reward(self, rewards: Mapping[str, float]) -> None:
        """Adds rewards to the last turn."""
        if rewards:
            own = self.rewards.setdefault(len(self.ledger.sampled) - 1, {})
            own |= {name: own.get(name, 0.0) + value for name, value in rewards.items()}

    @property
    def turns(self) -> tuple[Turn, ...]:
        if self.conversations is None:
            return self.ledger.turns(self.rewards)
        return self.conversations.turns(self.rewards.get(0, {}))


def _said(reply: Reply) -> Message:
    """The policy's reply as a message, for logs and rewards; it is never rendered."""
    thought = {"reasoning_content": reply.thought} if reply.thought else {}
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
        for c in reply.calls
    ]
    return {"role": "assistant", "content": reply.text, **thought, **({"tool_calls": calls} if calls else {})}
