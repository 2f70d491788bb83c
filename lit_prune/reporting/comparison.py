"""The tables of several runs: quality, zero-shot tasks, divergence from the dense model, cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_prune.reporting import wording
from lit_prune.reporting.cells import Basis, Cell
from lit_prune.reporting.compared import Compared
from lit_prune.reporting.reading import blocks, figure, section
from lit_prune.reporting.sheet import Sheet, Table, rivalries


def tables(runs: Sequence[Compared]) -> list[Table]:
    """All tables that some run has figures for."""
    found = [sheet.table() for sheet in (_quality(runs), _zero_shot(runs), _divergence(runs), _cost(runs))]
    return [table for table in found if table]


def reading_aid(runs: Sequence[Compared]) -> list[str]:
    """How to read all of the tables, in sentences."""
    among = " and at the same sparsity asked for" if len(set(rivalries(runs))) > 1 else ""
    said = [
        f"The best of what was measured in the same way{among} is in bold. Errors are compared on the same text and "
        "model only, times and memory on the same machine and model only. –: not measured."
    ]
    used = {part for run in runs for part in wording.method_label(run.metrics).split(" + ")}
    explained = [f"{short}: {long}" for short, long in wording.ABBREVIATIONS.items() if short in used]
    return [*said, "; ".join(explained) + "."] if explained else said


def _quality(runs: Sequence[Compared]) -> Sheet:
    sheet = Sheet(
        "quality",
        "Perplexity and error",
        runs,
        "Error: of the last block, the mean over all elements of (dense block on the dense stream − pruned block on "
        "the pruned stream)².",
        "Sparsity: the share of zeros in all pruned layers.",
    )
    for run in runs:
        sparsity = figure(run.metrics, "sparsity")
        sheet.put(run, ("sparsity",), 0, Cell(sparsity, wording.percent(sparsity)))
        for text, pruned, basis in run.perplexities:
            dense = Cell(basis.dense, wording.perplexity(basis.dense), basis)
            entry = Cell(pruned, wording.perplexity(pruned), basis)
            sheet.put(run, (f"perplexity, {text}", basis.words), -1, entry, dense)
    for run in runs:
        last = blocks(run.metrics)[-1] if blocks(run.metrics) else {}
        for label, key in (("error, calibration", "error"), ("error, held-out", "validation_error")):
            error = figure(last, key, "after")
            sheet.put(run, (label,), -1, Cell(error, wording.number(error), run.text))
    return sheet


def _zero_shot(runs: Sequence[Compared]) -> Sheet:
    sheet = Sheet("zero_shot", "Zero-shot tasks", runs)
    for run in runs:
        zero_shot = section(run.evaluation, "zero_shot")
        tasks = section(zero_shot, "tasks")
        for task, found in tasks.items():
            words = f"{found['metric']} on {found['samples']} samples, ± its standard error; {found['convention']}"
            basis = Basis(words, model=run.reference)
            dense, pruned = (_score(found, stage, basis) for stage in ("dense", "pruned"))
            accuracy = wording.is_accuracy(found["metric"])
            label = task if accuracy else f"{task} ({found['metric']})"
            sheet.put(run, (label,), int(accuracy), pruned, dense)
    for run in runs:
        zero_shot = section(run.evaluation, "zero_shot")
        tasks = section(zero_shot, "tasks")
        if len(tasks) > 1:
            measured = ", ".join(f"{task} ({found['metric']}, {found['samples']})" for task, found in tasks.items())
            ways = "; ".join(dict.fromkeys(str(found["convention"]) for found in tasks.values()))
            basis = Basis(f"unweighted mean of {measured}; {ways}", model=run.reference)
            means = (figure(zero_shot, "mean", stage) for stage in ("pruned", "dense"))
            sheet.put(run, ("mean",), 1, *(Cell(mean, wording.accuracy(mean), basis) for mean in means))
    return sheet


def _score(found: Mapping[str, Any], stage: str, basis: Basis) -> Cell:
    value, error = figure(found, stage, "value"), figure(found, stage, "stderr")
    return Cell(value, wording.score(found["metric"], value, error), basis)


def _divergence(runs: Sequence[Compared]) -> Sheet:
    sheet = Sheet(
        "divergence",
        "Divergence from the dense model",
        runs,
        "KL: mean divergence of the next-token distribution from the dense model's, in nats a token; "
        "top-1 agreement: how often both hold the same token for the likeliest.",
    )
    for run in runs:
        for text, found in section(run.evaluation, "divergence").items():
            tokens = section(section(run.evaluation, "perplexity"), text).get("tokens_sha256", "")
            basis = Basis(str(found["convention"]), f"{run.reference}, {text}", tokens=tokens)
            kl, agreement = figure(found, "kl"), figure(found, "top1_agreement")
            sheet.put(run, (f"KL, {text}", basis.words), -1, Cell(kl, wording.number(kl), basis))
            entry = Cell(agreement, wording.percent(agreement), basis)
            sheet.put(run, (f"top-1 agreement, {text}", basis.words), 1, entry)
    return sheet


def _cost(runs: Sequence[Compared]) -> Sheet:
    sheet = Sheet(
        "cost",
        "Time and memory",
        runs,
        "Seconds by the clock on the wall, in all processes of the run, with whatever else the machine did meanwhile; "
        "peak memory: resident on the host, allocated on the device.",
    )
    for run in runs:
        for stage, seconds in section(run.metrics, "seconds").items():
            sheet.put(run, (stage,), -1, Cell(seconds, wording.duration(seconds), run.machine))
    for run in runs:
        for place in ("host", "device"):
            count = figure(run.metrics, "peak_memory_bytes", place)
            sheet.put(run, (f"peak memory, {place}",), -1, Cell(count, wording.size(count), run.machine))
    return sheet
