"""A finished run, or any other model, that is to be judged, compared or exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_prune.errors import BadInput


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end.

    Attributes:
        path: its folder.
        metrics: what its `metrics.json` holds.
        config: its `config.yaml`, as it is written.
        evaluation: what its `evaluation.json` holds; None where it was not evaluated.
    """

    path: Path
    metrics: Mapping[str, Any]
    config: str
    evaluation: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, key: str) -> "FinishedRun":
        """Read a run's folder.

        Args:
            path: the folder.
            key: the setting that names it, for complaints.

        Raises:
            BadInput: it holds no run, or one that is not finished.
        """
        if not is_run(path):
            raise BadInput(f"{key}: '{path}' holds no run; give the output_dir of a finished `lit-prune fit`.")
        if _json(path / "manifest.json", key).get("finished") is not True:
            raise BadInput(
                f"{key}: the run in '{path}' is not finished; `lit-prune fit --config {path / 'config.yaml'}` "
                "goes on with it."
            )
        evaluation = path / "evaluation.json"
        return cls(
            path,
            _json(path / "metrics.json", key),
            (path / "config.yaml").read_text(encoding="utf-8"),
            _json(evaluation, key) if evaluation.exists() else None,
        )

    @property
    def model(self) -> Path:
        """The folder of the pruned model."""
        return self.path / "model"

    @property
    def checkpoint(self) -> str:
        """The dense model, as `model.checkpoint` named it."""
        return str(self.metrics["checkpoint"])


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{key}: '{file}' cannot be read ({error}); give another run.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{key}: '{file}' is not what a run writes; give another run.")
    return content


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (path / "manifest.json").is_file()


def run_or_model(given: str, key: str) -> tuple[str, FinishedRun | None]:
    """What a verb was given: the model to take, and the run that it came of, if it did.

    Args:
        given: a run's folder, a Hugging Face folder, a hub id, or whatever else `model.checkpoint` takes.
        key: the setting that names it, for complaints.

    Raises:
        BadInput: a run that is not finished.
    """
    path = Path(given).expanduser()
    if not is_run(path):
        return given, None
    run = FinishedRun.open(path, key)
    return str(run.model), run
