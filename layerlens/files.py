"""Files written in one step, and JSON as layerlens keeps it; without torch, so that looking is quick."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from layerlens.errors import DiskFullError, RunFolderError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        RunFolderError: The folder can't be written, or the disk is full; an old file is unharmed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = stream.name
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room; what was saved before is kept" if full else "choose another folder with --out"
        kind = DiskFullError if full else RunFolderError
        raise kind(f"can't write {str(path)!r}: {error.strerror or error}; {advice}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, atomically; NaN is refused."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that layerlens wrote.

    Raises:
        RunFolderError: Missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"can't read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise RunFolderError(f"{str(path)!r} is damaged ({error}); delete it to have it made again") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{str(path)!r} is damaged (it holds no object); delete it to have it made again")
    return content


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; read in parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def numbered(path: Path) -> Path:
    """The first of `path-1`, `path-2`, … that is not there yet."""
    return next(found for n in count(1) if not (found := path.with_name(f"{path.name}-{n}")).exists())
