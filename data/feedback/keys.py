"""Names for texts and people: hashes that are equal where the things are."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from align_pipeline.data.rows import Message

_int64 = struct.Struct(">q").unpack
_encode = msgspec.json.Encoder().encode


def _key(whole: bytes) -> int:
    """Return 64 bits, signed; of ten million texts two share one with probability 3e-6."""
    key: int
    (key,) = _int64(hashlib.blake2b(whole, digest_size=8).digest())
    return key


def answer_key(prompt: int | None, text: str) -> int:
    """Return the name of an answer to the prompt of a name."""
    return texts_key((str(prompt), text))


def prompt_key(prompt: Sequence[Message], *, ignore_system: bool = False) -> int:
    """Return the name of a prompt: role and text of every turn; case and inner white space count, as in code."""
    turns = prompt[1:] if ignore_system and prompt[0].role == "system" else prompt
    return texts_key([part for turn in turns for part in (turn.role, turn.content)])


def texts_key(texts: Sequence[str]) -> int:
    """Return the name of some texts in their order."""
    if len(texts) == 2:
        return _key(f"{len(texts[0])},{len(texts[1])}\0{texts[0]}\0{texts[1]}".encode())
    lengths = ",".join([str(len(text)) for text in texts])  # with lengths nothing runs together
    return _key("\0".join([lengths, *texts]).encode())


def name_key(source: str, name: str) -> int:
    """Return the name of an id, which is unique within its source."""
    return _key(f"{source}\0{name}".encode("utf-8", "surrogatepass"))


def body_key(*parts: object) -> int:
    """Return the name of all that an event says, given as plain values."""
    return _key(_encode(parts))


def salt(folder: Path) -> bytes:
    """Return the secret that users are hashed with, made at the first use; only its owner can read it."""
    path = folder / "salt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return bytes.fromhex(path.read_text(encoding="ascii"))


def user_hash(user: str, secret: bytes) -> str:
    """Return the name that stands for a user: 16 hexadecimal digits of HMAC-SHA256."""
    return hmac.digest(secret, user.encode("utf-8", "surrogatepass"), "sha256")[:8].hex()


def tombstones(folder: Path) -> frozenset[str]:
    """Return the hashes of the users that asked to be forgotten."""
    path = folder / "tombstones"
    return frozenset(re.findall(r"^[0-9a-f]{16}$", path.read_text("ascii"), re.M)) if path.is_file() else frozenset()
