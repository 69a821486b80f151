"""Episodes of a verifiers environment for a trainer in another process and virtual environment.

    python verifiers_program.py TASKSET      stdin   {"id": 0, "base_url": "...", "api_key": "...", "columns": {...}}
                                             stdout  {"id": 0, "reward": 1.0}

Run with the Python of the virtual environment that has verifiers; TASKSET is the module of the environment.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import json
import os
import sys

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import env_config_type, load_environment


async def play(env: vf.Env, request: dict) -> dict:
    """One episode on the policy behind the request's endpoint."""
    name = f"CISPO_API_KEY_{request['id']}"  # a client of verifiers reads its key from the environment
    os.environ[name] = request["api_key"]
    client = vf.EvalClientConfig(base_url=request["base_url"], api_key_var=name)
    kind = type(env.taskset).task_type()
    task = kind(kind.data_type()(**request["columns"]), env.config.taskset.task)
    episode = await env.run_episode(task, vf.ModelContext(client=client, model="policy"))
    del os.environ[name]
    errors = [error.message for error in (*episode.errors, *(e for trace in episode.traces for e in trace.errors))]
    return {"id": request["id"], "reward": sum(trace.reward for trace in episode.traces), "errors": errors}


async def serve(taskset: str) -> None:
    """Answers each line of stdin; all episodes run side by side."""
    env = load_environment(env_config_type(taskset)(taskset={"id": taskset}))
    lines = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running = set[asyncio.Task]()

    async def answer(line: bytes) -> None:
        print(json.dumps(await play(env, json.loads(line))), flush=True)

    async with env.serving():
        async for line in lines:
            task = asyncio.create_task(answer(line))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
