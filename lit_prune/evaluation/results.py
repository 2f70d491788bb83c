"""The file that holds what was measured of a model, written after every part."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_prune import __version__
from lit_prune.atomic import write_json
from lit_prune.errors import BadInput

SIDES = ("dense", "pruned")


class Results:
    """The figures of one model, with those of the dense one beside them; what a file holds already is kept.

    Args:
        path: the file; None keeps the figures in memory only.
        model: what is measured, as it was named.
        dense: the dense model that it is compared with; None for none.
        overwrite: begin anew, whatever the file holds.
        own: the file lies in the folder of the run that it is about, and may have moved with it.

    Raises:
        BadInput: the file holds something else, or figures of other models.

    Attributes:
        figures: what the file holds.
    """

    def __init__(self, path: Path | None, model: str, dense: str | None, overwrite: bool, own: bool = False) -> None:
        self.path = path
        self.figures: dict[str, Any] = {
            "model": model,
            "dense": dense,
            "perplexity": {},
            "divergence": {},
            "zero_shot": None,
            "seconds": 0.0,
        }
        if path is not None and path.exists() and not overwrite:
            earlier = _read(path)
            for key, value in (("model", model), ("dense", dense)):
                if earlier.get(key) != value and not (own and key == "model"):
                    raise BadInput(
                        f"output: '{path}' holds figures with '{earlier.get(key)}' as {key}, not '{value}'; "
                        "give another file, or --overwrite true."
                    )
            self.figures |= earlier | {"model": model}
        self.figures["versions"] = {"lit_prune": __version__, "python": platform.python_version()} | {
            name: version(name) for name in ("torch", "transformers")
        }

    def lacks_text(self, name: str, convention: str, digest: str) -> bool:
        """Whether a text's perplexity is still to be measured.

        Raises:
            BadInput: it was measured in another way, or is that of another text of the same name.
        """
        found = self.figures["perplexity"].get(name)
        if found and found["tokens_sha256"] != digest and found["convention"] == convention:
            raise BadInput(
                f"texts: '{self.path}' holds figures of another text called '{name}'; rename one, give another "
                "--output, or --overwrite true."
            )
        self._check(name, found and found["convention"], convention)
        return found is None

    def lacks_task(self, name: str, convention: str, limit: int | None) -> bool:
        """Whether a task is still to be asked.

        Raises:
            BadInput: it was asked in another way, or other tasks under another limit.
        """
        measured = self.figures["zero_shot"] or {"limit": limit, "tasks": {}}
        if measured["limit"] != limit:
            raise BadInput(
                f"limit: '{self.path}' holds tasks with a limit of {measured['limit'] or 'null'}, not of "
                f"{limit or 'null'}; give that, another --output, or --overwrite true."
            )
        of_it = [task for task in measured["tasks"].values() if task["asked_as"] == name]
        self._check(name, of_it[0]["convention"] if of_it else None, convention)
        return not of_it

    def _check(self, name: str, found: str | None, convention: str) -> None:
        if found and found != convention:
            raise BadInput(
                f"output: '{self.path}' holds '{name}' measured in another way ({found}), not as asked for now "
                f"({convention}); give another --output, or --overwrite true."
            )

    def add_text(
        self,
        name: str,
        convention: str,
        digest: str,
        dense: float | None,
        pruned: float,
        divergence: Mapping[str, object] | None,
    ) -> None:
        """Add a text's perplexities, and the divergence with its convention where both models were measured."""
        self.figures["perplexity"][name] = {
            "convention": convention,
            "tokens_sha256": digest,
            "dense": dense,
            "pruned": pruned,
        }
        if divergence is not None:
            self.figures["divergence"][name] = dict(divergence)

    def add_task(
        self, name: str, convention: str, limit: int | None, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    ) -> None:
        """Add a task's figures, and renew the means over all tasks.

        Args:
            name: of the task or group that was asked.
            convention: how.
            limit: the first so many questions.
            scores: of each side that was measured, what `ZeroShot.measure` returns.
        """
        shot = self.figures["zero_shot"] = self.figures["zero_shot"] or {"limit": limit, "tasks": {}}
        for task, score in scores["pruned"].items():
            sides = {
                side: {key: scores[side][task][key] for key in ("value", "stderr")} if side in scores else None
                for side in SIDES
            }
            shot["tasks"][task] = {
                "asked_as": name,
                "convention": convention,
                "metric": score["metric"],
                "samples": score["samples"],
                **sides,
            }
        shot["mean"] = {side: _mean(list(shot["tasks"].values()), side) for side in SIDES}

    def save(self, seconds: float) -> None:
        """Write the file.

        Args:
            seconds: what the part that was added last has taken.
        """
        self.figures["seconds"] += seconds
        if self.path is not None:
            write_json(self.path, self.figures)


def _mean(tasks: list[dict[str, Any]], side: str) -> float | None:
    """The mean accuracy; none if a task was not measured, or by something else than accuracy."""
    if any(task[side] is None or task["metric"] != "acc" for task in tasks):
        return None
    return sum(float(task[side]["value"]) for task in tasks) / len(tasks)


def _read(path: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"output: '{path}' cannot be read ({error}); give another file, or --overwrite true.") from error
    kinds = {"model": str, "perplexity": dict, "divergence": dict, "seconds": float | int}
    if not isinstance(earlier, dict) or any(not isinstance(earlier.get(k), kind) for k, kind in kinds.items()):
        raise BadInput(f"output: '{path}' is no file that evaluate wrote; give another one.")
    return earlier
