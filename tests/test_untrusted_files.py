"""Nothing is unpickled and no code is run from a folder that a user names: a trap in each folder would make a file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cispo import cli
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.errors import UserError
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.rollout.renderer import load_tokenizer
from cispo.rollout.rows import load_rows
from tests.test_bad_input import CHARS, TINY
from tests.test_vllm_parity import QWEN3

PICKLES = ["pytorch_model.bin", "consolidated.00.pth", "weights.pt", "policy.pkl"]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that must not appear."""
    file = tmp_path / "mark"
    yield file
    assert not file.exists(), "something was unpickled or run"


@pytest.fixture
def trap(mark: Path) -> bytes:
    return pickle.dumps(Trap(mark))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_policy(init_policy({"vocab_size": 128, **TINY}, seed=0), tmp_path / "model")
    return tmp_path / "model"


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "seen"))).close()
    assert (tmp_path / "seen").exists()


def vllm(folder: Path) -> VLLMEngine:
    return VLLMEngine(str(folder), dtype="float32", max_context=64, max_sequences=2, seed=0)


def torch_engine(folder: Path) -> TorchEngine:
    return TorchEngine(str(folder), dtype="float32", max_context=64, max_sequences=2)


@pytest.mark.parametrize("load", [load_policy, torch_engine, vllm])
@pytest.mark.parametrize("name", PICKLES)
def test_a_model_folder_of_pickles_is_refused(
    load: Callable[[Path], object], name: str, model: Path, trap: bytes
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(trap)
    with pytest.raises(UserError, match=f"holds weights as {name}.*convert them to safetensors"):
        load(model)


@pytest.mark.parametrize("load", [load_policy, torch_engine])
def test_pickles_under_other_names_are_refused(load: Callable[[Path], object], model: Path, trap: bytes) -> None:
    (model / "model.safetensors").write_bytes(trap)
    with pytest.raises(UserError, match="broken or cut short"):
        load(model)
    (model / "model.safetensors").unlink()
    (model / "shard.bin").write_bytes(trap)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "shard.bin"}}))
    with pytest.raises(UserError, match="names shard.bin, which is not a safetensors file"):
        load(model)


def test_vllm_reads_safetensors_alone(tmp_path: Path, trap: bytes) -> None:
    """A pickle beside good weights stays unread; one in their place is refused."""
    save_policy(init_policy(QWEN3, seed=0), tmp_path / "model")
    for name in PICKLES:
        (tmp_path / "model" / name).write_bytes(trap)
    vllm(tmp_path / "model").close()
    (tmp_path / "model" / "model.safetensors").write_bytes(trap)
    with pytest.raises(UserError, match="broken or cut short"):
        vllm(tmp_path / "model")


def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cispo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sentence = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in sentence
    return sentence


def test_commands_refuse_pickles_before_anything_starts(
    model: Path, trap: bytes, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(trap)
    monkeypatch.chdir(tmp_path)
    quickstart = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")
    policy = f"policy={{model: {model}, config: null, tokenizer: {CHARS}}}"
    for arguments in (
        ("train", quickstart, policy, "sft=null"),
        ("evaluate", quickstart, "--checkpoint", str(model)),
        ("export", str(model), "--to", str(tmp_path / "out")),
    ):
        assert "holds weights as pytorch_model.bin" in refused(capfd, monkeypatch, *arguments)
    assert not (tmp_path / "runs").exists()
    for setting, sentence in (("load_format: pt", "load_format"), ("trust_remote_code: true", "trust_remote_code")):
        assert sentence in refused(capfd, monkeypatch, "show", quickstart, f"rollout.engine_args={{{setting}}}")


def test_code_in_a_model_folder_is_not_run(model: Path, mark: Path) -> None:
    """In the way of models on the hub: config.json names a class in a file beside it."""
    save_policy(init_policy(QWEN3, seed=0), model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    load_policy(model)
    try:
        vllm(model).close()
    except UserError:
        pass  # vLLM may refuse the folder as well


@pytest.mark.parametrize("class_name", ["EvilTokenizer", "PreTrainedTokenizerFast"])
def test_code_and_pickles_in_a_tokenizer_folder_are_not_run(
    class_name: str, tmp_path: Path, mark: Path, trap: bytes
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(CHARS, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": class_name, "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass EvilTokenizer: pass\n")
    for name in ("vocab.pkl", "vocab.bin", "tokenizer.pkl", "spiece.model"):
        (folder / name).write_bytes(trap)
    try:
        assert load_tokenizer(folder)("1")["input_ids"]
    except UserError as error:
        assert "tokenizer" in str(error)
    (folder / "tokenizer.json").write_bytes(trap)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.parquet", "rows.jsonl"])
def test_a_dataset_of_pickles_is_refused(name: str, tmp_path: Path, trap: bytes) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / name).write_bytes(trap)
    for source in (folder, folder / name):
        with pytest.raises(UserError, match="data"):
            load_rows(str(source), "train", {}, None, "data")


def test_a_script_in_a_dataset_folder_is_not_run(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        load_rows(str(tmp_path / "rows"), "train", {}, None, "data")


def test_a_pickle_in_a_tar_of_a_dataset_stays_bytes(tmp_path: Path, trap: bytes) -> None:
    import tarfile

    (tmp_path / "rows").mkdir()
    for name in ("0.pickle", "0.pkl", "0.pyd"):
        (tmp_path / name).write_bytes(trap)
    with tarfile.open(tmp_path / "rows" / "rows.tar", "w") as tar:
        for name in ("0.pickle", "0.pkl", "0.pyd"):
            tar.add(tmp_path / name, arcname=name)
    rows = load_rows(str(tmp_path / "rows"), "train", {}, None, "data")
    assert rows[0]["pkl"] == trap and os.listdir(tmp_path / "rows") == ["rows.tar"]
