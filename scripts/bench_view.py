"""Time to write, open and filter the page of `cispo view`, in headless Chromium.

    python scripts/bench_view.py --attempts 10000 --tokens 200 [--pictures FOLDER]

A run of 20 steps is made up: 8 attempts a prompt, the same prompts in every epoch, values of each token. `open` is the
time from the start of the navigation until the list and an attempt are laid out, `filter` the longest of some searches,
orders and sets, layout included. With `--pictures`, the page at 1280 and at 400 pixels.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from cispo.output.folder import RunLog
from cispo.output.token_values import TokenRow
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.types import Completion, FinishReason, Prompt, Trajectory, TrajectoryGroup, Turn

STEPS, GROUP, EPOCH = 20, 8, 5
PROMPT = 20
"""Tokens of a prompt."""

PROBE = """
<script>
(() => {
  document.body.getBoundingClientRect();
  const told = {open: performance.now()}, at = id => document.getElementById(id), spent = {};
  const act = (name, id, value, event) => {
    const begin = performance.now();
    if (id === "valued") at(id).checked = value; else at(id).value = value;
    at(id).dispatchEvent(new Event(event));
    document.body.getBoundingClientRect();
    spent[name] = performance.now() - begin;
  };
  for (const text of ["7", "71", "71 3", "no such text", ""]) act(`search '${text}'`, "search", text, "input");
  for (const order of ["best", "worst", "up", "rescued", "gap", "entropy", "long"]) act(order, "sort", order, "change");
  act("set", "set", "1", "change"); act("all sets", "set", "", "change"); act("values", "valued", true, "change");
  const begin = performance.now();
  document.querySelectorAll(".row")[3].click();
  document.body.getBoundingClientRect();
  told.attempt = performance.now() - begin;
  told.filters = spent;
  document.body.dataset.told = JSON.stringify(told);
})();
</script>
"""


def make_run(folder: Path, attempts: int, tokens: int) -> None:
    """A run folder with recipe.yaml and samples/; an evaluation in every fifth step."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_yaml(load_recipe("quickstart")))
    log, draw = RunLog(folder, board=False), np.random.default_rng(0)
    prompts = attempts // STEPS // GROUP
    for step in range(1, STEPS + 1):
        groups, rows = [], []
        for number in range(prompts):
            place = (step - 1) % EPOCH * prompts + number
            group, own = _group(place, step, tokens, draw)
            groups.append(group)
            rows += own
        log.samples(step, groups, kind="eval" if step % EPOCH == 0 else "train", tokens=rows)
    log.close()


def _group(place: int, step: int, tokens: int, draw: np.random.Generator) -> tuple[TrajectoryGroup, list[TokenRow]]:
    trajectories, rows = [], []
    for index in range(GROUP):
        length = int(draw.integers(tokens // 2, tokens * 3 // 2))
        ids, logprobs = draw.integers(4, 90, length), -draw.exponential(0.5, length)
        ratio = np.exp(draw.normal(0, 0.2, length))
        values = {
            "sampler_logprobs": logprobs,
            "learner_logprobs": logprobs + draw.normal(0, 1e-5, length),
            "ratio": ratio,
            "weight": np.minimum(ratio, 1.3),
            "entropy": draw.exponential(0.5, length),
            "advantages": np.full(length, draw.normal()),
        }
        sequence = np.concatenate([draw.integers(4, 90, PROMPT), ids]).astype(np.int32)
        rows.append(
            TokenRow(
                sequence=sequence,
                spans=np.array([PROMPT, length], dtype=np.int32),
                values={name: array.astype(np.float32) for name, array in values.items()},
                update=step,
            )
        )
        completion = Completion(
            token_ids=tuple(ids.tolist()),
            logprobs=tuple(logprobs.tolist()),
            finish_reason=FinishReason.STOP,
            versions=(step,) * length,
        )
        reward = float(draw.random() < step / STEPS)
        trajectories.append(
            Trajectory(
                group_id=place,
                index=index,
                turns=(Turn(context_ids=tuple(sequence[:PROMPT].tolist()), completion=completion),),
                text=" ".join(str(number) for number in draw.integers(0, 999, length // 4)),
                reward=reward,
                rewards={"right": reward},
            )
        )
    problem = np.random.default_rng(place).integers(10, 99, 12)
    text = f"Problem {place}: sort {' '.join(str(number) for number in problem)}"
    prompt = Prompt(id=place, messages=({"role": "user", "content": text},))
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories)), rows


def in_chromium(page: Path, folder: Path, *options: str, part: str = "") -> str:
    """Chromium's output for a page, at an attempt (`#3`)."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("bench_view needs Chromium")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
    done = subprocess.run(
        [*command, *options, page.as_uri() + part], capture_output=True, text=True, check=False, timeout=300
    )
    if not done.stdout and "--dump-dom" in options:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    from cispo.commands.view.command import view

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder / "run", arguments.attempts, arguments.tokens)
        page, probed = folder / "page.html", folder / "probed.html"
        began = time.perf_counter()
        view(folder / "run", page, limit=arguments.attempts)
        print(f"write {time.perf_counter() - began:.1f} s")
        probed.write_text(page.read_text() + PROBE)
        found = re.search(r'data-told="([^"]*)"', in_chromium(probed, folder / "profile", "--dump-dom"))
        if found is None:
            raise SystemExit("the page did not get ready")
        told = json.loads(html.unescape(found[1]))
        slowest = max(told["filters"], key=told["filters"].get)
        print(f"open {told['open']:.0f} ms, an attempt {told['attempt']:.0f} ms")
        print(f"filter {told['filters'][slowest]:.0f} ms at most ({slowest})")
        for width, part in ((1280, ""), (400, ""), (400, "#3")) if arguments.pictures else ():
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            file = arguments.pictures.absolute() / f"view_{width}{part and '_attempt'}.png"
            in_chromium(page, folder / "profile", f"--window-size={width},900", f"--screenshot={file}", part=part)
            print(file)


if __name__ == "__main__":
    main()
