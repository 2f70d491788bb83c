"""Files and folders that come into being whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_prune.errors import BadInput

_PARTIAL = ".partial-"


@contextmanager
def built_whole(target: Path) -> Iterator[Path]:
    """A path to build a file or folder at, which becomes `target` only when the body has ended well.

    A run that is killed in between leaves nothing under the final name, so whatever stands there is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target.parent))
    try:
        draft = workshop / target.name
        yield draft
        for file in [draft, *draft.rglob("*")]:
            _flush(file)
        try:
            draft.replace(target)
        except OSError:
            if not (draft.is_dir() and target.is_dir()):  # else another process finished the same folder first
                raise
        _flush(target.parent)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk itself, so that a power cut cannot take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with built_whole(target) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a figure that is not finite becomes null, which JSON can say."""
    write_text(target, json.dumps(_finite(content), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_writable(file: Path, key: str) -> None:
    """Find out before long work whether a file can be written.

    Args:
        file: it, or what it is to be.
        key: the setting that names it, for complaints.

    Raises:
        BadInput: it cannot.
    """
    if file.is_dir():
        raise BadInput(f"{key}: '{file}' is a folder; give a file.")
    existing = next(parent for parent in file.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise BadInput(f"{key}: '{file}' cannot be written ({error.strerror}); give another file.") from error


def is_partial(path: Path) -> bool:
    """Whether this is what `built_whole` builds in."""
    return path.name.startswith(_PARTIAL)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder and the folders below it."""
    for workshop in folder.rglob(f"{_PARTIAL}*"):
        shutil.rmtree(workshop, ignore_errors=True)
