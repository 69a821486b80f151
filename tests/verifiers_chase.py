"""The task of `chase` as an environment of the verifiers library (0.4), which runs in a virtual environment of its own
and imports nothing of CISPO: a task, an environment that answers the policy, and a harness without a process."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator
from string import ascii_lowercase

import httpx
import verifiers.v1 as vf

__all__ = ["ChaseEnv", "ChaseTaskset", "InProcess"]


class ChaseData(vf.TaskData):
    table: str
    answer: str


class ChaseTask(vf.Task[ChaseData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def solved(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)


class ChaseTaskset(vf.Taskset[ChaseTask, vf.TasksetConfig]):
    def load(self) -> Iterator[ChaseTask]:
        yield from ()  # rows are the trainer's


class ChaseConfig(vf.EnvConfig):
    walker: vf.AgentConfig = vf.AgentConfig(runtime={"type": "subprocess"}, max_turns=8)


class ChaseEnv(vf.Env[ChaseConfig]):
    async def run(self, task: ChaseTask, agents: vf.Agents) -> None:
        async with agents.walker.interaction(task) as exchange:
            segment = await exchange.turn()
            while not segment.terminated and not segment.last_reply.startswith("="):
                key = segment.last_reply.partition(":")[2]
                found = task.data.table[ascii_lowercase.index(key)] if key and key in ascii_lowercase else "!"
                segment = await exchange.turn(f">{found}")


class InProcess(vf.Harness[vf.HarnessConfig]):
    """One request a turn, without a program of its own."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False
    _client: httpx.AsyncClient | None = None

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):  # noqa: ANN001
        self._client = self._client or httpx.AsyncClient(timeout=None, trust_env=False)
        prompt = [{"role": "user", "content": data.prompt}] if isinstance(data.prompt, str) else data.prompt
        messages = [m if isinstance(m, dict) else m.model_dump(include={"role", "content"}) for m in prompt]
        answer = await self._client.post(
            f"{endpoint}/chat/completions",
            json={"model": ctx.model, "messages": messages},
            headers={"Authorization": f"Bearer {secret}"},
        )
        return vf.ProgramResult(exit_code=0 if answer.is_success else 1, stdout="", stderr=answer.text)
