"""A finished run, or any other model, that is to be judged, compared or exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lit_prune.errors import BadInput


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end.

    Attributes:
        path: its folder.
        metrics: what its `metrics.json` holds.
        config: its `config.yaml`, as it is written.
        evaluation: what its `evaluation.json` holds; None where it was not evaluated, or nobody has asked.
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
        run = cls(path, _json(path / "metrics.json", key), _text(path / "config.yaml", key))
        if not isinstance(run.metrics.get("checkpoint"), str):
            raise BadInput(f"{key}: '{path / 'metrics.json'}' is not what a run writes; give another run.")
        try:
            sound = isinstance(run.settings, dict)
        except yaml.YAMLError:
            sound = False
        if not sound:
            raise BadInput(f"{key}: '{path / 'config.yaml'}' is not what a run writes; give another run.")
        return run

    def with_evaluation(self, key: str) -> "FinishedRun":
        """The run with what its `evaluation.json` holds, if it was evaluated.

        Raises:
            BadInput: the file is damaged.
        """
        file = self.path / "evaluation.json"
        return replace(self, evaluation=_json(file, key) if file.exists() else None)

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration, read."""
        settings: dict[str, Any] = yaml.safe_load(self.config)
        return settings

    @property
    def model(self) -> Path:
        """The folder of the pruned model."""
        return self.path / "model"

    @property
    def checkpoint(self) -> str:
        """The dense model, as `model.checkpoint` named it."""
        return str(self.metrics["checkpoint"])


def _text(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{key}: '{file}' cannot be read ({error}); give another run.") from error


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(file, key))
    except ValueError as error:
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
        BadInput: a run that is not finished, or whose model is gone.
    """
    path = Path(given).expanduser()
    if not is_run(path):
        return given, None
    run = FinishedRun.open(path, key)
    if not run.model.is_dir():  # its name could be one on the hub
        raise BadInput(f"{key}: the run in '{path}' has lost its model, '{run.model}'; give another run.")
    return str(run.model), run
