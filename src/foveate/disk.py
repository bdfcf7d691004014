"""Reading JSON, and writing to a disk that may be full: one clear line for everything that fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from foveate.errors import CheckpointError, FoveateError


def umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def plain_errors(what: str | Path, folder: str | Path, way_out: str) -> Iterator[None]:
    """Turn errors of writing into one CheckpointError: `what` was not written, the reason, and `way_out`.

    folder: where it goes; a full disk is reported with the room that is left there. Libraries that are written in Rust
    raise errors of their own, which only name the system's number: those count too.
    """
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        named = re.search(r"os error (\d+)", str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        if number is None and not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = os.strerror(number) if number else " ".join(str(error).split())
        if number in (errno.ENOSPC, errno.EDQUOT):
            place = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
            reason += f" ({shutil.disk_usage(place).free / 2**20:.0f} MiB free)"
        raise CheckpointError(f"could not write {what}: {reason}; {way_out}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError with the path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
