"""Proof that a folder is as it was written: the size and the SHA-256 of every file, kept in its cispo.json.

    files --seal--> cispo.json: {"files": {name: size}, "sha256": {name: digest}} --damage--> None, or the damage

The hashes of large files are computed where they are written, in the background (`files.note_digest`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cispo.errors import UserError
from cispo.files import digest_note, digest_of, write_json

FACTS = "cispo.json"


def seal(folder: Path, facts: Mapping[str, object]) -> None:
    """Writes cispo.json: `facts`, and the size and hash of every file in the folder."""
    notes = {digest_note(file): file for file in folder.rglob("*") if file.is_file()}
    known = {file: note.read_text(encoding="ascii") for note, file in notes.items() if note.is_file()}
    for note, file in notes.items():
        if file in known:
            note.unlink()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    hashes = {str(file.relative_to(folder)): known.get(file) or digest_of(file) for file in files}
    write_json(folder / FACTS, {**facts, "files": sizes, "sha256": hashes})


def check_sealed(folder: Path, name: str, *, only: str = "*") -> None:
    """Raises UserError where a folder was sealed, and its files (those like `only`) are not as they were then."""
    problem = damage(folder, hashes=True, only=only) if (folder / FACTS).exists() else None
    if problem is not None:
        raise UserError(f"{name} {folder} is damaged: {problem}")


def damage(folder: Path, *, hashes: bool, only: str = "*") -> str | None:
    """The first difference of a sealed folder from the state that was sealed, as a clause; None where it is whole.

    `hashes` reads every file, else sizes alone are compared. `only` is a pattern of the files to look at. A folder that
    version 0.1.0 sealed has no hashes.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sizes = facts["files"]
        digests = facts.get("sha256")
        if not sizes or not isinstance(sizes, dict) or not isinstance(digests, dict | None):
            return f"{FACTS} lists no files"
        for name, size in sizes.items():
            file = folder / name
            if not file.match(only):
                continue
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if hashes and digests is not None and digest_of(file) != digests.get(name):
                return f"{name} is not as it was written: its hash differs"
    except FileNotFoundError:
        return f"{FACTS} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FACTS} cannot be read"
    return None
