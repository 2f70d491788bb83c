"""A run's folder: all there is to know about a run, complete or not, readable at every moment.

Every file is written under a temporary name and then renamed. A block counts as done once `manifest.json` lists it,
which is written last.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prune import ranks
from lit_prune.atomic import built_whole, is_partial, sweep, write_json, write_text
from lit_prune.errors import BadInput

_LOCKS: dict[tuple[int, int], int] = {}
"""Folders that this process has locked for as long as it lives: device and inode, and the descriptor."""

log = logging.getLogger(__name__)

KEY = "output_dir"

PLACES = (
    *(KEY, "model.offload", "data.memory_share", "data.device_share"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
)
"""Settings that say where things lie and who computes them, so that a run may go on with others."""


class RunFolder:
    """The folder of one run, new or to be continued.

    Args:
        path: the folder.
        config: the resolved configuration in YAML.

    Raises:
        BadInput: the path is a file or not writable, or the folder holds something else than this very run.

    Attributes:
        path: the folder.
        config: its configuration.
        metrics: what `metrics.json` holds; saved by `save_metrics`.
    """

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.metrics: dict[str, Any] = {}
        self.config = config
        self._manifest: dict[str, Any] = {"rounds": 0, "blocks": {}, "pending": {}, "finished": False}
        self._held = False
        self._manifest, self.metrics = ranks.told_by_first(self._open)

    def _open(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take up what is there already; of several ranks, the first does so, as it does all that is written."""
        path = self.path
        if path.is_dir() and any(path.iterdir()):
            self._hold()
        if path.is_dir() and not self._is_fresh():
            self._reopen(self.config)
            sweep(path)
        else:
            require_writable(path)
        return self._manifest, self.metrics

    def _is_fresh(self) -> bool:
        """Whether a folder is empty, or holds what a run puts down first and no more."""
        names = {file.name for file in self.path.iterdir() if not is_partial(file)}
        first = self.path / "config.yaml"
        return not names or (names == {first.name} and first.read_bytes() == self.config.encode())

    def keep_to(self, sequences: str) -> None:
        """Let the run be one on these calibration sequences from its beginning to its end.

        Args:
            sequences: their checksum, which `begin` puts down.

        Raises:
            BadInput: it was begun on others.
        """
        if self._manifest.setdefault("sequences_sha256", sequences) != sequences:
            raise BadInput(
                f"{KEY}: '{self.path}' holds a run on other calibration sequences: the text in data.source or "
                "data.self_generated, or the tokenizer, has changed since it was begun; give another folder, or the "
                "same text to go on."
            )

    def begin(self) -> None:
        """Put down the configuration, unless an interrupted run has done so.

        Raises:
            BadInput: another process has begun a run here meanwhile.
        """
        ranks.told_by_first(self._begin)

    def _begin(self) -> None:
        if not self._held:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            if not self._is_fresh():
                raise BadInput(f"{KEY}: another process has begun a run in '{self.path}'; give another folder.")
        sweep(self.path)
        if not (self.path / "manifest.json").exists():
            write_text(self.path / "config.yaml", self.config)
            self._save_manifest()

    def _hold(self) -> None:
        """Keep other processes out; the lock is the folder's own and goes with this process, whatever ends it."""
        self._held = True
        folder = os.open(self.path, os.O_RDONLY)
        found = os.fstat(folder)
        if (inode := (found.st_dev, found.st_ino)) in _LOCKS:
            os.close(folder)
            return
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _LOCKS[inode] = folder
        except BlockingIOError:
            os.close(folder)
            raise BadInput(
                f"{KEY}: another process is at work in '{self.path}'; wait for it, or give another folder."
            ) from None

    def _reopen(self, config: str) -> None:
        metrics = self.path / "metrics.json"
        try:
            earlier = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            self._manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            if metrics.is_file():
                self.metrics = json.loads(metrics.read_text(encoding="utf-8"))
            if not (isinstance(earlier, Mapping) and _is_manifest(self._manifest) and _are_metrics(self.metrics)):
                raise ValueError("not what a run writes")
        except (OSError, ValueError, yaml.YAMLError):
            raise BadInput(f"{KEY}: '{self.path}' is not empty and holds no run of ours; give another.") from None
        if changed := different_keys(earlier, yaml.safe_load(config)):
            raise BadInput(
                f"{KEY}: '{self.path}' holds another run, which differs in {', '.join(changed)}; "
                "give another folder, or the same settings to go on."
            )
        if not self.finished:
            self._forget_damaged()
            self._forget_unmeasured()
        if self.metrics:
            self.metrics["blocks"] = self.metrics["blocks"][: self.entered]
            self.metrics["trainings"] = [t for t in self.metrics["trainings"] if t["round"] < self.rounds]

    def _forget_damaged(self) -> None:
        """Go back to before the first block whose file is missing or was altered, so that it is made anew."""
        entries = self._manifest["blocks"] | self._manifest["pending"]
        damaged = [index for index, entry in entries.items() if not self._is_sound(entry)]
        if not damaged:
            return
        first = min(damaged, key=int)
        blocks: dict[str, Any] = self._manifest["blocks"]
        # a round after which nothing is pending can be gone back to
        kept = {index: entry for index, entry in blocks.items() if int(index) < int(first)}
        whole = [after for entry in kept.values() if (after := entry.get("whole_after"))]
        rounds = max(whole, default=0)
        log.warning(
            "'%s' is missing or was altered since it was written: made anew, from round %d on",
            self.path / entries[first]["file"],
            rounds,
        )
        self._manifest |= {
            "rounds": rounds,
            "blocks": {index: entry for index, entry in kept.items() if entry.get("round", 0) < rounds},
            "pending": {},
        }
        self._save_manifest()

    def _forget_unmeasured(self) -> None:
        """Go back to the start where the figures of finished blocks are gone."""
        if self.rounds and not self.metrics:
            log.warning("'%s' is missing: all blocks are made anew", self.path / "metrics.json")
            self._manifest |= {"rounds": 0, "blocks": {}, "pending": {}}
            self._save_manifest()

    def _is_sound(self, entry: Mapping[str, Any]) -> bool:
        file = self.path / entry["file"]
        return file.is_file() and _checksum(file) == str(entry["sha256"])

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self._manifest["finished"])

    @property
    def rounds(self) -> int:
        """How many rounds are finished."""
        return int(self._manifest["rounds"])

    @property
    def done(self) -> int:
        """How many blocks are final."""
        return len(self._manifest["blocks"])

    @property
    def entered(self) -> int:
        """How many blocks are final or pruned and trained so far."""
        return self.done + len(self._manifest["pending"])

    def save_metrics(self) -> None:
        """Write `metrics.json`; a figure that is not finite becomes null, which JSON can say."""
        if ranks.rank() == 0:
            write_json(self.path / "metrics.json", self.metrics)

    def save_round(
        self, index: int, final: Mapping[int, Mapping[str, Tensor]], pending: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        """Write the blocks that a round has made final, and those that it leaves to the next, and list it as done."""
        self._manifest = ranks.told_by_first(partial(self._save_round, index, final, pending))

    def _save_round(
        self, index: int, final: Mapping[int, Mapping[str, Tensor]], pending: Mapping[int, Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        whole_after = None if pending else index + 1
        listed = {"round": index, "whole_after": whole_after}
        blocks = {str(block): self._write(f"{block:03d}", tensors) | listed for block, tensors in final.items()}
        self._manifest["pending"] = {
            str(block): self._write(f"{block:03d}.round-{index}", tensors) for block, tensors in pending.items()
        }
        self._manifest["blocks"] |= blocks
        self._manifest["rounds"] = index + 1
        self._save_manifest()
        for block in [*final, *pending]:
            self.gradients(block).unlink(missing_ok=True)
        self._remove_unlisted()
        return self._manifest

    def _remove_unlisted(self) -> None:
        """Remove pending blocks of earlier rounds."""
        listed = {self.path / entry["file"] for entry in self._manifest["pending"].values()}
        for file in (self.path / "blocks").glob("*.round-*"):
            if file not in listed:
                file.unlink()

    def load_block(self, index: int) -> dict[str, Tensor]:
        """Read one block that is final or pending.

        Raises:
            BadInput: the file is missing or was altered.
        """
        entry = (self._manifest["blocks"] | self._manifest["pending"])[str(index)]
        if not self._is_sound(entry):
            file = self.path / entry["file"]
            raise BadInput(f"{KEY}: '{file}' was altered while the run was on; the same command makes it anew.")
        return load_file(self.path / entry["file"])

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        file = self.path / "blocks" / f"{name}.safetensors"
        with built_whole(file) as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
        return {"file": f"blocks/{file.name}", "sha256": _checksum(file)}

    def gradients(self, index: int) -> Path:
        """Where the gradients of one block are kept until it is finished."""
        return self.path / "gradients" / f"{index:03d}.safetensors"

    def finish(self) -> None:
        """Mark the run as complete."""
        ranks.told_by_first(self._finish)

    def _finish(self) -> None:
        self._remove_unlisted()  # a run may have died between listing the last round and removing what it replaced
        for name in ("gradients", "hidden"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self._manifest["finished"] = True
        self._save_manifest()

    def _save_manifest(self) -> None:
        write_json(self.path / "manifest.json", self._manifest)


def _is_manifest(manifest: Any) -> bool:
    """Whether it has the structure of ours, and names no file elsewhere."""
    kinds = {"rounds": int, "blocks": dict, "pending": dict, "finished": bool}
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        return False
    entries = {**manifest["blocks"], **manifest["pending"]}
    listed = [index for index in entries if index.isdecimal()]
    return sorted(map(int, listed)) == list(range(len(entries))) and all(
        isinstance(entry, dict)
        and re.fullmatch(r"blocks/[\w.-]+\.safetensors", str(entry.get("file")))
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("round", 0), int)
        and isinstance(entry.get("whole_after", 0), int | None)
        for entry in entries.values()
    )


def _are_metrics(metrics: Any) -> bool:
    """Whether there are none yet, or they have what a run that goes on looks at."""
    if metrics == {}:
        return True
    lists = [metrics.get(key) for key in ("blocks", "trainings")] if isinstance(metrics, dict) else [None]
    return all(isinstance(found, list) and all(isinstance(item, dict) for item in found) for found in lists) and all(
        isinstance(training.get("round"), int) for training in metrics["trainings"]
    )


def different_keys(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations differ, but for those that change no weight."""
    changed = []
    for key in sorted(set(earlier) | set(now)):
        a, b = earlier.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += different_keys(a, b, f"{prefix}{key}.")
        elif a != b and prefix + key not in PLACES:
            changed.append(prefix + key)
    return changed


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def new_folder(given: str, key: str) -> Path:
    """A folder that is not there yet and can be made.

    Args:
        given: the folder.
        key: the setting that names it.

    Raises:
        BadInput: it is there, or cannot be made.
    """
    path = Path(given).expanduser()
    if path.exists():
        raise BadInput(f"{key}: '{given}' exists already, and nothing is overwritten; give a new folder.")
    require_writable(path, key)
    return path


def require_writable(path: Path, key: str = KEY) -> None:
    """Check that a folder can be made.

    Raises:
        BadInput: it cannot; `key` is the setting that names it.
    """
    existing = _existing(path)
    if not existing.is_dir():
        raise BadInput(f"{key}: '{existing}' is a file; give a folder.")
    try:
        Path(tempfile.mkdtemp(dir=existing)).rmdir()
    except OSError as error:
        raise BadInput(f"{key}: '{path}' cannot be written ({error.strerror}); give another folder.") from error


def require_space(path: Path, needed: int) -> None:
    """Check that a folder, which may be there already, can grow to a size.

    Raises:
        BadInput: fewer than the bytes that it lacks are free there.
    """
    lacking = needed - sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(path)).free
    if free < lacking:
        raise BadInput(
            f"{KEY}: '{path}' lies where {free / 1e9:.3g} GB are free, but the run needs {lacking / 1e9:.3g} GB more; "
            "free some, or give a folder on another disk."
        )


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
