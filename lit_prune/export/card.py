"""The model card: what a model is, what it was measured at, and how to make it again. Nothing in it is guessed."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lit_prune import __version__
from lit_prune.finished import FinishedRun
from lit_prune.reporting import wording
from lit_prune.reporting.headline import headline
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
        parts += [_method(run), "## Figures", *_figures(run.metrics), *_evaluation(run.path)]
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
    yield _table(["", *table.columns], [[row.label, *(cell.shown for cell in row.cells)] for row in table.rows])
    if table.footnote:
        yield table.footnote.replace("*", "\\*")
    for text, convention in section(metrics, "perplexity_convention").items():
        yield f"Perplexity on {text}: {convention}."
    yield (
        "A block's error is the mean over all elements of (dense block on the dense model's hidden states - pruned "
        "block on the pruned model's)²."
    )


def _evaluation(folder: Path) -> Iterable[str]:
    """What `lit-prune evaluate` has measured, if it was asked to."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return
    measured = json.loads(file.read_text(encoding="utf-8"))
    yield "Measured by `lit-prune evaluate`:"
    rows = [
        [f"perplexity, {text}", wording.perplexity(value["dense"]), wording.perplexity(value["pruned"])]
        for text, value in section(measured, "perplexity").items()
    ]
    for text, value in section(measured, "divergence").items():
        rows.append([f"divergence from the dense model, {text}, nats a token", "-", wording.number(value["kl"])])
        rows.append([f"same likeliest token, {text}", "-", wording.percent(value["top1_agreement"])])
    zero_shot = section(measured, "zero_shot")
    for task, value in section(zero_shot, "tasks").items():
        cells = [_accuracy(value.get(model)) for model in ("dense", "pruned")]
        rows.append([f"{task} ({value['metric']}, {value['samples']} samples)", *cells])
    if mean := section(zero_shot, "mean"):
        rows.append(["mean of the tasks", *(wording.percent(mean[model]) for model in ("dense", "pruned"))])
    yield _table(["", "dense", "pruned"], rows)
    for key in ("perplexity", "divergence"):
        for text, value in section(measured, key).items():
            yield f"{key.capitalize()} on {text}: {value['convention']}."


def _accuracy(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return wording.NOT_MEASURED
    return f"{wording.percent(figure['value'])} ± {wording.percent(figure['stderr'])}"


def _again(run: FinishedRun) -> Iterable[str]:
    versions = ", ".join(f"{name} {version}" for name, version in section(run.metrics, "versions").items())
    yield "Save this as `config.yaml`; `lit-prune fit --config config.yaml` repeats the run."
    yield f"```yaml\n{run.config.strip()}\n```"
    yield f"Versions: {versions}."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
