"""`cispo view`: the samples of a run as one web page, read from the run folder alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cispo.commands.view.page import render_page
from cispo.commands.view.samples import read_samples
from cispo.errors import UserError
from cispo.files import disk_errors, write_text
from cispo.output.screen import new_console, warn
from cispo.recipe.load import read_stored
from cispo.rollout.renderer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def view(run: Path, out: Path | None, *, limit: int) -> None:
    """Writes the page to `out`, or to view_NAME.html in the current directory.

    Raises UserError where `run` is no run folder with samples.
    """
    console, started = new_console(), time.perf_counter()
    samples = read_samples(run, limit)
    name = run.absolute().name
    file = out or Path(f"view_{name}.html")
    if file.is_dir():
        raise UserError(f"--out {file} is a folder: name a file")
    page = render_page(samples, run=str(run), title=name, token_text=token_texts(run, samples.notes))
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, page)
    for note in samples.notes:
        warn(console, note)
    size = file.stat().st_size / 2**20
    seconds = time.perf_counter() - started
    console.print(f"{len(samples.attempts):,} attempts in {file} ({size:.1f} MiB, {seconds:.1f} s)", soft_wrap=True)


def token_texts(run: Path, notes: list[str]) -> Callable[[int], str]:
    """Token id -> its text, by the tokenizer of the newest checkpoint, else the recipe's; numbers without one.

    The bytes of a token that is a part of a character are written as <e2 80>.
    """
    for folder in _tokenizer_folders(run):
        try:
            return _text_by(load_tokenizer(folder))
        except UserError:
            continue
    notes.append("no tokenizer of the run was found: tokens are shown by their numbers")
    return "<{}>".format


def _text_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    def text(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"
        if "\u2581" in piece:
            return piece.replace("\u2581", " ")
        shown = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(shown, str)
        return _bytes_of(piece) if "\ufffd" in shown and "\ufffd" not in piece else shown

    return text


def _tokenizer_folders(run: Path) -> list[Path]:
    """Folders with a tokenizer of the run's policy."""
    steps = sorted((run / "checkpoints").glob("step_*"), key=lambda folder: folder.name, reverse=True)
    found = [folder for folder in (*steps, run / "checkpoints" / "initial") if folder.is_dir()]
    try:
        policy = read_stored(run / "recipe.yaml").policy
        found += [Path(name) for name in (policy.tokenizer, policy.model) if name]
    except (UserError, OSError):
        pass
    return [folder for folder in found if folder.is_dir() and has_tokenizer(folder)]


def _bytes_of(piece: str) -> str:
    """The bytes of a token of a byte-level tokenizer, which writes each of them as one character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return "<" + " ".join(f"{bytes_of[c]:02x}" if c in bytes_of else c for c in piece) + ">"
