"""Puts figures into words: numbers with the digits that matter, units, and the sentences of the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_prune.reporting.reading import blocks, diverged, figure, is_reconstructed, section, spikes

NOT_MEASURED = "not measured"

SOME_OVERFITTING, STRONG_OVERFITTING = 1.25, 2.0
"""Held-out error over calibration error from which the verdict speaks of some, and of strong, overfitting."""

RECONSTRUCTIONS = {
    "none": "not reconstructed",
    "layer": "then reconstructed layer by layer",
    "block": "then reconstructed block by block",
    "cross_block": "then reconstructed in windows of neighbouring blocks",
    "sublayer": "then reconstructed by halves of a block, attention and MLP apart",
}


def short_name(source: object) -> str:
    """A checkpoint or text as a reader knows it: of a file in a published package, only the file's name."""
    text = str(source)
    return text.split("?")[0].rsplit("/", 1)[-1] if text.startswith("package://") else text


def number(value: float | None, digits: int = 3) -> str:
    """A figure to `digits` significant digits, without an exponent where a reader can do without."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def perplexity(value: float | None) -> str:
    """A perplexity as papers print it: two decimals, unless it is so high that they say nothing."""
    small = value is not None and abs(value) < 1000
    return f"{value:.2f}" if small else number(value)


def percent(value: float | None) -> str:
    """A share in [0, 1] as a percentage, with up to two decimals."""
    return NOT_MEASURED if value is None else f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%"


def accuracy(value: float | None, stderr: float | None = None) -> str:
    """An accuracy in percent as papers print it, with its standard error if there is one."""
    if value is None:
        return NOT_MEASURED
    return f"{100 * value:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "") + "%"


def is_accuracy(metric: str) -> bool:
    """Whether a task's metric is a share of right answers, of which more is better; of others that is not known."""
    return metric.startswith("acc")


def score(metric: str, value: float | None, stderr: float | None = None) -> str:
    """A task's figure: an accuracy in percent, anything else as it is."""
    if is_accuracy(metric) or value is None:
        return accuracy(value, stderr)
    return number(value) + (f" ± {number(stderr, 2)}" if stderr is not None else "")


def duration(seconds: float | None) -> str:
    """Seconds in the two units that fit best."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 59.95:  # what would round to 60.0 s is a minute
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float | None) -> str:
    """A number of bytes."""
    if count is None:
        return NOT_MEASURED
    return f"{number(count / 1e6)} MB" if count < 1e9 else f"{number(count / 1e9)} GB"


def machine(facts: Mapping[str, Any]) -> str:
    """The machine of a run; empty where it was not recorded."""
    if not facts:
        return ""
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    if (processes := facts.get("processes", 1)) > 1:
        threads = f"{processes} processes of {threads}"
    return " and ".join(filter(None, (f"{facts['cpu']} ({threads})", facts.get("accelerator"))))


def listing(items: Sequence[object]) -> str:
    """List items as prose does: 3; 3 and 5; 3, 5 and 7."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def which_blocks(indices: Sequence[int]) -> str:
    """Name blocks: block 3; blocks 3 and 5; runs of three and more as blocks 3 to 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts: list[object] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return f"block{'s' if len(indices) > 1 else ''} {listing(parts)}"


def sparsity_asked(asked: object) -> str:
    """What was asked for, in words: a share such as 0.5, or a pattern n:m, which keeps n of m."""
    text = str(asked)
    kept, colon, group = text.partition(":")
    if colon:
        return f"{kept} of every {group} weights kept ({text})"
    try:
        return f"{percent(float(text))} of the weights removed"
    except ValueError:
        return f"sparsity {text}"


def method_in_words(metrics: Mapping[str, Any]) -> str:
    """The method as half a sentence, such as "50% of the weights removed by Wanda, then ..."."""
    method = section(metrics, "method")
    parts = "Pruned" if method.get("sparsity") is None else sparsity_asked(method["sparsity"])
    if method.get("mask"):
        by = ", chosen by" if ":" in str(method.get("sparsity")) else " by"
        parts += f"{by} {method['mask']}"
    if method.get("allocation"):
        parts += f", shared out among blocks by {method['allocation']}"
    if method.get("solver"):
        parts += f", the others solved for by {method['solver']}"
    if method.get("true_sequential"):
        parts += ", each layer behind the pruned ones of its block"
    reconstruction = method.get("reconstruction")
    if reconstruction is not None:
        parts += ", " + RECONSTRUCTIONS.get(reconstruction, f"then reconstructed ({reconstruction})")
    if method.get("independent") and is_reconstructed(metrics):
        parts += " on the dense model's own hidden states, each by itself"
    elif method.get("global_propagation") and is_reconstructed(metrics):
        parts += " towards the dense model's own hidden states (global propagation)"
    return parts


ABBREVIATIONS = {
    "TS": "true sequential: each layer is pruned by what comes through the pruned layers before it in its block",
    "LR": "layer-wise reconstruction",
    "BR": "block-wise reconstruction",
    "CR": "cross-block reconstruction",
    "SR": "reconstruction of attention and MLP apart",
    "GP": "global propagation: targets from the dense model's own hidden states",
    "IP": "independent propagation: inputs from the dense model's hidden states too",
}
_SHORT = {"layer": "LR", "block": "BR", "cross_block": "CR", "sublayer": "SR"}


def method_label(metrics: Mapping[str, Any]) -> str:
    """The method in a few letters, as a table's row has room for: Wanda 50% + BR + GP."""
    method = section(metrics, "method")
    asked = str(method.get("sparsity"))
    share = asked if ":" in asked or asked == "None" else percent(float(asked))
    parts = [f"{method.get('mask')} {share}"]
    parts += [str(method[key]) for key in ("allocation", "solver") if method.get(key)]
    parts += ["TS"] * bool(method.get("true_sequential"))
    if is_reconstructed(metrics):
        parts.append(_SHORT.get(method["reconstruction"], method["reconstruction"]))
        if method.get("independent"):
            parts.append("IP")
        elif method.get("global_propagation"):
            parts.append("GP")
    return " + ".join(parts)


def gain(metrics: Mapping[str, Any]) -> str:
    """What reconstruction did to the last block's error; empty where there is nothing to compare."""
    if not is_reconstructed(metrics) or not blocks(metrics):
        return ""
    last = blocks(metrics)[-1]
    parts = []
    for text, key in (("calibration", "error"), ("held-out", "validation_error")):
        before, after = figure(last, key, "before"), figure(last, key, "after")
        if before is not None and after is not None:
            parts.append(f"{_change(before, after)} on {text} text")
    return f"By its reconstruction, the error of block {last['index']} {listing(parts)}." if parts else ""


def _change(before: float, after: float) -> str:
    if before == after:
        return f"stayed at {number(after)}"
    return f"{'fell' if after < before else 'rose'} from {number(before)} to {number(after)}"


def overfitting(metrics: Mapping[str, Any]) -> str:
    """The verdict on overfitting: the last block's error on held-out against calibration text."""
    last = blocks(metrics)[-1] if blocks(metrics) else {}
    calibration, held_out = figure(last, "error", "after"), figure(last, "validation_error", "after")
    if calibration is None or held_out is None:
        missing = "calibration" if calibration is None else "held-out"
        return f"Overfitting cannot be judged: the last block's error on {missing} text was not measured."
    if calibration == 0:
        if held_out == 0:
            return "No overfitting: the last block's error is exactly 0 on calibration and on held-out text."
        return (
            "The last block's error is exactly 0 on calibration text, "
            f"but {number(held_out)} on held-out text: it holds for the calibration text only."
        )
    ratio = held_out / calibration
    fact = (
        f"the last block's error on held-out text is {number(ratio)} times that on calibration text "
        f"({number(held_out)} against {number(calibration)})"
    )
    if not is_reconstructed(metrics):
        return f"Without reconstruction there is little to overfit: {fact}."
    if ratio < SOME_OVERFITTING:
        return f"No sign of overfitting: {fact}."
    if ratio < STRONG_OVERFITTING:
        return f"Some overfitting: {fact}."
    return (
        f"Strong overfitting: {fact}. Much of what reconstruction gained holds for the calibration text "
        "only; more calibration text is the usual remedy."
    )


def divergence(metrics: Mapping[str, Any]) -> str:
    """Name the trainings that diverged and say what came of them; empty where none did."""
    found = diverged(metrics)
    if not found:
        return ""
    return (
        f"Training diverged in {listing(found)}: its loss rose, or was no number any more. The weights kept are those "
        "of the best epoch on held-out text, or of the last one that had a loss. A lower optimizer.lr is the usual "
        "remedy."
    )


def spike_note(metrics: Mapping[str, Any]) -> str:
    """Name the blocks whose error stands out and say what that is; empty where none does.

    On massive activations: Sun et al., 2024, arXiv 2402.17762.
    """
    found = spikes(metrics)
    if not found:
        return ""
    moment = {"before": " before reconstruction" if is_reconstructed(metrics) else "", "after": ""}
    facts = "; ".join(
        f"block {spike.block} has an error of {number(spike.error)} on {spike.curve.text} text"
        f"{moment[spike.curve.moment]}, the median of its neighbours is {number(spike.neighbours)}"
        for spike in found
    )
    return (
        f"{facts[0].upper()}{facts[1:]}. Usually a few tokens with massive activations, "
        "hundreds of times the size of all others, are behind such an error: they dominate a mean squared "
        "error. It says little about the other tokens, and can be high while the perplexity is good."
    )
