"""The model card: what a model is, what it was measured at, and how to make it again. Nothing in it is guessed."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lit_prune import __version__
from lit_prune.finished import FinishedRun
from lit_prune.reporting import wording
from lit_prune.reporting.headline import Headline, conventions, evaluated, headline
from lit_prune.reporting.reading import section

USE = """An ordinary folder (`model*.safetensors`) is read by `transformers`, zeros and all:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

A packed one (`packed.json`) is read by `lit_prune.load("FOLDER")`, bit for bit as it was, and made an ordinary one by
`lit-prune export FOLDER --output ANOTHER`."""

GGUF = "It is a GGUF file for llama.cpp, with zeros in it."


def card(run: FinishedRun | None, given: str, form: str, name: str) -> str:
    """The card in Markdown.

    Args:
        run: the run that the model came of; None if it is not known.
        given: what the model was called.
        form: the format of the export.
        name: what the export is called.
    """
    base = run.checkpoint if run and not run.metrics.get("checkpoint_is_local") else None
    data = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        pipeline_tag="text-generation",
        tags=["lit-prune", *(["pruned"] if run else []), *(["gguf"] if form == "gguf" else [])],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name.rsplit('/', 1)[-1]}"]
    if run is None:
        parts.append(
            f"`{wording.short_name(given)}`, exported by lit-prune {__version__}. It was not given as a run of "
            "lit-prune, so that base model, method and figures are not known here."
        )
    else:
        evaluation = run.with_evaluation("model").evaluation
        parts += [_method(run), "## Figures", *_figures(run.metrics), *_evaluation(evaluation or {})]
    parts += ["## Use", GGUF if form == "gguf" else USE]
    if run is not None:
        parts += ["## To make it again", *_again(run)]
    return "\n\n".join(parts) + "\n"


def _is_hub_id(checkpoint: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)) and not Path(checkpoint).exists()


def _method(run: FinishedRun) -> str:
    metrics = run.metrics
    calibration = section(metrics, "calibration")
    lines = [
        f"- Base model: `{wording.short_name(run.checkpoint)}`, whose licence holds for this one too",
        f"- Method: {wording.method_in_words(metrics)}",
        f"- Sparsity: {wording.percent(metrics.get('sparsity'))} of the weights in pruned layers are zero",
    ]
    if calibration:
        lines.append(
            f"- Calibration: {calibration['samples']} sequences of {calibration['sequence_length']} tokens of "
            f"`{wording.short_name(calibration['source'])}`"
        )
    return "Pruned after training by lit-prune.\n\n" + "\n".join(lines)


def _figures(metrics: Mapping[str, Any]) -> Iterable[str]:
    table = headline(metrics)
    yield _table(table)
    if table.footnote:
        yield table.footnote.replace("*", "\\*")
    for text, convention in section(metrics, "perplexity_convention").items():
        yield f"Perplexity on {text}: {convention}."
    yield (
        "A block's error is the mean over all elements of (dense block on the dense model's hidden states - pruned "
        "block on the pruned model's)²."
    )


def _evaluation(evaluation: Mapping[str, Any]) -> Iterable[str]:
    """What `lit-prune evaluate` has measured, if it was asked to, as the run's own report has it."""
    if found := evaluated(evaluation):
        yield "Measured by `lit-prune evaluate`:"
        yield _table(found)
        yield from conventions(evaluation)


def _again(run: FinishedRun) -> Iterable[str]:
    versions = ", ".join(f"{name} {version}" for name, version in section(run.metrics, "versions").items())
    yield "Save this as `config.yaml`; `lit-prune fit --config config.yaml` repeats the run."
    yield f"```yaml\n{run.config.strip()}\n```"
    yield f"Versions: {versions}."


def _table(table: Headline) -> str:
    """The table in Markdown."""
    rows = [[row.label, *(cell.shown for cell in row.cells)] for row in table.rows]
    lines = [["", *table.columns], ["---", *("---:" for _ in table.columns)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
