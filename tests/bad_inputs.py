"""Bad inputs of `test_bad_input.test_further_bad_inputs`: name -> what it makes in an empty folder, and the refusal.

A case is (maker, part of the sentence). The maker writes its files into the current directory and returns the
command's arguments.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from cispo.policies.loading import init_policy, save_policy

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
TINY = {
    "model_type": "minimax",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_local_experts": 2,
    "initializer_range": 0.1,
}
ROW = '{"prompt": "1>", "answer": "1"}\n'

Maker = Callable[[], list[str]]
Case = tuple[Maker, str]


def values() -> dict[str, object]:
    """A small recipe that works."""
    sorting: dict[str, object] = {"source": "rewards.sorting:problems", "args": {"size": 8, "seed": 0, "count": 2}}
    return {
        "name": "bad",
        "runtime": "local",
        "policy": {"tokenizer": str(CHARS), "config": dict(TINY)},
        "data": sorting,
        "eval": {**sorting, "split": "test"},
        "reward": {"functions": [{"fn": "rewards.exact:exact_match"}]},
        "rollout": {"engine": "torch", "prompts_per_step": 2, "group_size": 2, "max_context": 32, "max_tokens": 4},
        "train": {"steps": 1},
    }


def recipe(**sections: object) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump({**values(), **sections}))
    return "recipe.yaml"


def written(content: str | bytes) -> Maker:
    """`cispo show` of a recipe with this content."""

    def make() -> list[str]:
        Path("raw.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["show", "raw.yaml"]

    return make


def override(*items: str) -> Maker:
    return lambda: ["train", recipe(), *items]


def command(*arguments: str) -> Maker:
    """The command with the recipe as its first argument."""
    return lambda: [arguments[0], recipe(), *arguments[1:]]


def rows(content: str | bytes, name: str = "rows.jsonl", **keys: object) -> Maker:
    def make() -> list[str]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["train", recipe(data={"source": name, **keys})]

    return make


def parquet(*, cut: bool = False, name: str = "rows.parquet") -> Maker:
    def make() -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"question": "1>"}]), name)
        if cut:
            Path(name).write_bytes(Path(name).read_bytes()[:200])
        return ["train", recipe(data={"source": name})]

    return make


def tokenizer(files: Mapping[str, str | None], **config: object) -> Maker:
    """The small tokenizer with other contents of files, None for no file, and other keys of its config."""

    def make() -> list[str]:
        Path("tok").mkdir()
        whole = {name: (CHARS / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
        whole["tokenizer_config.json"] = json.dumps({**json.loads(whole["tokenizer_config.json"]), **config})
        for name, text in {**whole, **files}.items():
            if text is not None:
                Path("tok", name).write_text(text)
        return ["train", recipe(policy={"tokenizer": "tok", "config": dict(TINY)})]

    return make


def model(change: Callable[[Path], object], *arguments: str) -> Maker:
    """A small model's folder after a change; training from it, or a command on it."""

    def make() -> list[str]:
        save_policy(init_policy({"vocab_size": 128, **TINY}, seed=0), "model")
        change(Path("model"))
        if arguments:
            return [recipe() if argument == "RECIPE" else argument for argument in arguments]
        return ["train", recipe(policy={"tokenizer": str(CHARS), "model": "model"})]

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Maker:
    file = "model.safetensors"
    return model(lambda folder: save_file(change(load_file(folder / file)), folder / file))


def index(names: object) -> Maker:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return model(change)


def judge(text: str) -> Maker:
    def make() -> list[str]:
        Path("my_judge.py").write_text(text)
        sys.modules.pop("my_judge", None)
        return ["train", recipe(reward={"functions": [{"fn": "my_judge:judge"}]})]

    return make


def term(**keys: object) -> Maker:
    return lambda: ["train", recipe(reward={"functions": [{"fn": "rewards.exact:exact_match", **keys}]})]


def source(text: str) -> Maker:
    def make() -> list[str]:
        Path("my_rows.py").write_text(text)
        sys.modules.pop("my_rows", None)
        return ["train", recipe(data={"source": "my_rows:rows"})]

    return make


def beside(name: str, content: str, *arguments: str) -> Maker:
    """The command with the recipe and a further file."""

    def make() -> list[str]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
        return [arguments[0], recipe(), *arguments[1:]]

    return make


def pair(*items: str, **sections: object) -> Maker:
    def make() -> list[str]:
        for name, changes in (("a.yaml", {}), ("b.yaml", sections)):
            Path(name).write_text(yaml.safe_dump({**values(), **changes}))
        return ["compare", "a.yaml", "b.yaml", *items]

    return make


def pipe(name: str) -> Maker:
    def make() -> list[str]:
        os.mkfifo(name)
        return ["show", name] if name.endswith(".yaml") else ["train", recipe(data={"source": name})]

    return make


def bomb(merge: str) -> str:
    lines = ["a: &a0 {x: 1}"]
    lines += [f"b{i}: &a{i} {{{merge}: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)]
    return "\n".join(lines)


_ECHOES = ["    a0: lol", *(f"    a{i}: '{f'${{policy.config.a{i - 1}}}' * 9}'" for i in range(1, 12))]

CASES: dict[str, Case] = {
    # Text of a recipe
    "recipe in latin-1": (written("name: a\n# \xe9".encode("latin-1")), "recipe raw.yaml is not valid YAML"),
    "picture": (written(b"\x89PNG\r\n\x1a\n\0\0"), "recipe raw.yaml is not valid YAML"),
    "tab": (written("rollout:\n\tgroup_size: 2"), "line 2"),
    "open quote": (written("name: 'a"), "line 1: while scanning a quoted scalar"),
    "two documents": (written("name: a\n---\nname: b"), "line 2: expected a single document"),
    "a list": (written("- name: a"), "does not hold keys and values"),
    "nothing but a comment": (written("# nothing"), "does not hold keys and values"),
    "300 kB": (written("# " + "x" * 300_000), "larger than 256 KiB"),
    "pipe without a writer": (pipe("pipe.yaml"), "recipe pipe.yaml cannot be read"),
    # Structure of a recipe
    "alias of itself": (written("data: &d {args: *d}"), "line 1 holds an alias of itself"),
    "alias bomb": (written(bomb("y")), "stands for more than 20,000 values"),
    "merge bomb": (written(bomb("<<")), "stands for more than 20,000 values"),
    "unknown alias": (written("data: *nowhere"), "undefined alias 'nowhere'"),
    "interpolation bomb": (
        written("\n".join(["policy:", "  tokenizer: t", "  config:", *_ECHOES])),
        "more than 24 interpolations",
    ),
    "500 levels": (written("data: {args: {x: " + "[" * 500 + "]" * 500 + "}}"), "more than 50 levels"),
    "Python object": (written("name: !!python/object/apply:os.system ['true']"), "python/object"),
    "bytes": (written("data: {source: a, args: {x: !!binary aGk=}}"), "binary"),
    "merge with a number": (written("data: {<<: 3}"), "expected a mapping"),
    "a list as key": (written("? [a]\n: b"), "line 1: a key must be text"),
    "dotted key": (written("learner.lr: 1"), "unknown key learner.lr (its parts are nested"),
    "base with a base": (written("base: raw.yaml"), "a base recipe cannot have a base"),
    "base of two": (written("base: [a]"), "base = ['a']"),
    "a folder as base": (written("base: ./"), "recipe . cannot be read"),
    # Numbers of a recipe
    "5,000 digits": (written("seed: " + "9" * 5000), "a number has 5,000 digits"),
    "beyond a double": (written("learner: {lr: 1e999}"), "1e999 is beyond the largest number"),
    "seed of 300 hex digits": (override("seed=0x" + "f" * 300), "seed = "),
    "tokens beyond 2^53": (override("rollout.max_tokens=99999999999999999999"), "rollout.max_tokens = "),
    "true as a number": (override("train.steps=true"), "train.steps = True: input should be a number"),
    "true in a list of numbers": (override("curriculum.length_stages=[[false, 4]]"), "curriculum.length_stages.0.0"),
    "a date as a number": (override("train.steps=2024-01-01"), "train.steps = '2024-01-01'"),
    "half a completion": (override("rollout.group_size=2.5"), "rollout.group_size = 2.5"),
    "NaN bound": (override("algorithm.ratio_max=.nan"), "algorithm.ratio_max = nan"),
    "NaN weight": (term(weight=float("nan")), "reward.functions.0.weight = nan"),
    "infinite learning rate": (override("learner.lr=.inf"), "learner.lr = inf"),
    "negative mask": (override("algorithm.mask_low=-1"), "algorithm.mask_low = -1"),
    "beta of 1": (override("learner.betas=[0.9, 1.0]"), "learner.betas.1 = 1.0"),
    "three betas": (override("learner.betas=[0.9, 0.9, 0.9]"), "learner.betas = "),
    # Types of sections
    "a list as section": (override("rollout=[1]"), "rollout holds keys and values"),
    "no section": (override("rollout=null"), "rollout = None"),
    "a text as list": (override("reward.functions=abc"), "reward.functions = 'abc'"),
    "no functions": (override("reward.functions=[]"), "reward.functions = []"),
    # Overrides
    "no value": (override("train.steps="), "train.steps = None"),
    "below a text": (override("name.x=1"), "name = {'x': 1}"),
    "twice in one": (override("learner={lr: 1, lr: 2}"), "the key learner.lr stands in line 1 already"),
    "open brace": (override("learner={lr: 1"), "override 'learner={lr: 1' is not valid YAML"),
    "no such variable": (override("output_dir=${oc.env:CISPO_NOT_SET}"), "CISPO_NOT_SET"),
    "no such key": (override("name=${nowhere}"), "name: Interpolation key 'nowhere' not found"),
    "open interpolation": (override("data.prompt=${"), "data.prompt: "),
    "capitals": (override("rollout.engine=VLLM"), "rollout.engine = 'VLLM'"),
    "two dots": (override("learner..lr=1"), "override 'learner..lr=1' is not of the form key=value"),
    "no key": (override("=1"), "is not of the form key=value"),
    "another base": (override("base=quickstart"), "base stands in a recipe's file alone"),
    "not UTF-8": (override("name=\udcff"), "is no text"),
    "placeholder": (override("data.prompt=???"), "data.prompt is ???"),
    # Names and folders
    "name of an option": (override("name=-rf"), "name = '-rf'"),
    "name of the folder above": (override("name=.."), "name = '..'"),
    "name of 300 letters": (override("name=" + "a" * 300), "name = "),
    "comparison above": (command("compare", "--name", "../x"), "--name '../x'"),
    "runs is a file": (beside("runs", "", "train"), "output_dir 'runs' cannot be written"),
    "runs below a file": (beside("file", "", "train", "output_dir=file/runs"), "output_dir 'file/runs'"),
    "folder of 300 letters": (override("output_dir=" + "a" * 300), "File name too long"),
    "NUL in a path": (written('output_dir: "a\\0b"'), "output_dir = "),
    "warm-up into a file": (
        beside("runs", "", "sft", "sft={steps: 1, data: {source: 'rewards.sorting:demonstrations', "
               "args: {size: 4, seed: 0, count: 2}}}"),
        "output_dir 'runs' cannot be written",
    ),
    # Rows
    "nothing but a BOM": (rows(b"\xef\xbb\xbf"), "has no rows"),
    "rows in UTF-16": (rows(ROW.encode("utf-16")), "cannot read"),
    "gzip": (rows(gzip.compress(ROW.encode())), "cannot read"),
    "half a parquet file": (parquet(cut=True), "cannot read"),
    "parquet as jsonl": (parquet(name="rows.jsonl"), "cannot read"),
    "jsonl as parquet": (rows(ROW, "rows.parquet"), "cannot read"),
    "other columns": (parquet(), "its columns are question"),
    "one object": (rows(ROW, "rows.json"), "must hold a list of rows"),
    "cut JSON": (rows('[{"prompt": "1>"', "rows.json"), "line 1 is not JSON"),
    "rows of numbers": (rows("3\n"), "line 1 is not an object"),
    "number as prompt": (rows('{"prompt": 5, "answer": "1"}\n'), "column 'prompt'"),
    "message without content": (rows('{"messages": [{"role": "user"}]}\n'), "column 'messages'"),
    "no messages": (rows('{"messages": []}\n'), "column 'messages'"),
    "100,000 levels": (rows('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n"), "nested too deeply"),
    "number of 5,000 digits in a row": (rows('{"prompt": "1>", "answer": ' + "9" * 5000 + "}\n"), "line 1"),
    "rows from a pipe": (pipe("rows.jsonl"), "rows.jsonl"),
    "open brace in a template": (rows(ROW, prompt="{prompt"), "template '{prompt'"),
    "attribute in a template": (rows(ROW, prompt="{prompt.nothing}"), "template '{prompt.nothing}'"),
    "place in a template": (rows(ROW, prompt="{}"), "template '{}'"),
    "csv": (rows("prompt,answer\n", "rows.csv"), "rows.csv"),
    "no rows wanted": (override("data.limit=0"), "data.limit = 0"),
    "rows from a number": (source("def rows(): return 3"), "my_rows:rows raised TypeError"),
    "rows that leave": (source("def rows(): raise SystemExit(3)"), "my_rows:rows raised SystemExit"),
    "rows with a syntax error": (source("def rows(:"), "SyntaxError"),
    "a module as rows": (override("data.source=os:path"), "'os:path' is not a function"),
    "unknown argument": (override("data.args.colour=red"), "colour"),
    # Tokenizers
    "tokenizer in another form": (tokenizer({"tokenizer.json": '{"version": "1.0"}'}), "cannot load the tokenizer"),
    "tokenizer cut short": (tokenizer({"tokenizer.json": "{"}), "cannot load the tokenizer"),
    "no tokenizer": (tokenizer({"tokenizer.json": None, "tokenizer_config.json": None}), "holds no tokenizer.json"),
    "config of a list": (tokenizer({"tokenizer_config.json": "[]"}), "cannot load the tokenizer"),
    "end token of a number": (tokenizer({}, eos_token=5), "cannot load the tokenizer"),
    "open template": (tokenizer({}, chat_template="{% for"), "chat template"),
    # Models
    "foreign weight": (weights(lambda t: {**t, "foreign": torch.zeros(2)}), "weight 'foreign' has no place"),
    "missing weight": (weights(lambda t: dict(list(t.items())[1:])), "weights are missing"),
    "integer weights": (weights(lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "is stored as I8"),
    "header of 2^62 bytes": (
        model(lambda m: (m / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")),
        "broken or cut short",
    ),
    "missing shard": (index({"a": "a.safetensors", "b": "b.safetensors"}), "lacks b.safetensors"),
    "shard above": (index({"a": "../a.safetensors"}), "names '../a.safetensors'"),
    "shard of a number": (index({"a": 5}), "names 5"),
    "index of a list": (index(["a"]), "has no weight_map"),
    "pickle": (
        model(lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin")),
        "convert them to safetensors",
    ),
    "config.json of a list": (model(lambda m: (m / "config.json").write_text("[]")), "is not a JSON object"),
    "no heads": (override("policy.config.num_attention_heads=0"), "num_attention_heads 0"),
    "width in words": (override("policy.config.hidden_size=wide"), "hidden_size 'wide'"),
    "true experts": (override("policy.config.num_local_experts=true"), "num_local_experts True"),
    "10^11 tokens": (override("policy.config.vocab_size=100000000000"), "this machine has"),
    "negative eps": (override("policy.config.rms_norm_eps=-1"), "rms_norm_eps -1"),
    "NaN standard deviation": (override("policy.config.initializer_range=.nan"), "initializer_range nan"),
    "layers of a number": (override("policy.config.layer_types=5"), "layer_types 5 must be a list"),
    "unknown family": (override("policy.config.model_type=nothing"), "model_type 'nothing'"),
    # Checkpoints
    "export of a file": (beside("file", "", "export", "--to", "out"), "recipe.yaml does not exist"),
    "export onto a file": (model(lambda m: Path("out").touch(), "export", "model", "--to", "out"), "is a file"),
    "export in int8": (
        model(lambda m: None, "export", "model", "--to", "out", "--dtype", "int8"),
        "--dtype 'int8' is unknown",
    ),
    "half a config.json": (
        model(lambda m: (m / "config.json").write_text("{"), "evaluate", "RECIPE", "--checkpoint", "model"),
        "config.json cannot be read",
    ),
    "column without a value": (
        model(lambda m: None, "generate", "RECIPE", "--checkpoint", "model", "--prompt", "1>", "--column", "answer"),
        "--column 'answer'",
    ),
    "recipe of the run is damaged": (beside("runs/bad/recipe.yaml", "{", "train", "--resume"), "runs/bad/recipe.yaml"),
    "recipe of the run has a key twice": (
        beside("runs/bad/recipe.yaml", "seed: 1\nseed: 2", "train", "--resume"),
        "the key seed stands in line 1 already",
    ),
    "nothing to resume": (command("train", "--resume"), "holds no run"),
    # Rewards
    "no colon": (term(fn="judge"), "'judge' is not of the form module:name"),
    "a number as judge": (judge("judge = 3"), "'my_judge:judge' is not a function"),
    "a judge of nothing": (judge("def judge(text): return 1"), "must take completion"),
    "a judge that exits": (judge("import sys; sys.exit(0)"), "SystemExit"),
    "a judge of a missing column": (judge("def judge(completion, colour): return 1"), "needs a column 'colour'"),
    "an argument without a reader": (term(args={"colour": 1}), "has no parameter 'colour'"),
    "no time": (override("reward.timeout=0"), "reward.timeout = 0"),
    # Comparisons
    "no algorithm": (command("compare", "--algorithms", "cispo,,grpo"), "a name is empty"),
    "open settings": (command("compare", "--algorithms", "grpo("), "'grpo(' is not of the form"),
    "settings that are no YAML": (command("compare", "--algorithms", "grpo(kl_coef={)"), "'kl_coef={' is not valid"),
    "a setting twice": (command("compare", "--algorithms", "grpo(kl_coef=0, kl_coef=1)"), "sets kl_coef twice"),
    "two squared updates": (command("compare", "--updates-per-batch", "\xb2"), "is not a positive number"),
    "two tasks": (pair(data={"source": "rewards.sorting:problems", "args": {"size": 9, "seed": 0}}), "different tasks"),
    "two budgets": (pair(train={"steps": 2}), "different budgets"),
    "results of a list": (beside("r.json", "[]", "compare", "--assert-equal", "r.json"), "is not the results.json"),
    # Warm-up, curriculum, devices
    "number as demonstration": (
        beside("d.jsonl", '{"prompt": "1>", "completion": 5}\n', "sft", "sft={data: {source: d.jsonl}}"),
        "sft.data: row 0",
    ),
    "no demonstrations": (override("sft.steps=1"), "key sft.data is missing"),
    "stages in no order": (override("curriculum.length_stages=[[0, 4], [0, 4]]"), "curriculum.length_stages"),
    "a GPU that is not there": (override("device=cuda"), "device: cuda, but there is no GPU here"),
    "no engines": (override("rollout.engines=0"), "rollout.engines = 0"),
    "another device": (override("device=tpu"), "device = 'tpu'"),
}  # fmt: skip
