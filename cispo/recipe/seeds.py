"""Seeds come from identities, never from the order of calls."""

from __future__ import annotations

import hashlib


def seed_of(*identity: int | str) -> int:
    """A 56-bit seed from an identity: run seed, purpose, step, ..."""
    text = "/".join(str(part) for part in identity)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
