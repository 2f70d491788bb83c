"""Reads the figures of a run's metrics: missing and null are the same, not measured."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

SPIKE_FACTOR = 10
"""How many times the median of its neighbours an error has to be to be named as a spike."""

NEIGHBOURS = 3
"""How many blocks on each side count as neighbours; enough for the median to survive two spikes in a row."""


@dataclass(frozen=True)
class ErrorCurve:
    """One kind of error over all blocks: on which text, and before or after reconstruction."""

    text: str
    moment: str
    errors: Sequence[float | None]


@dataclass(frozen=True)
class Spike:
    """A block whose error is far above the median of its neighbours, and a curve where it is."""

    block: int
    error: float
    neighbours: float
    curve: ErrorCurve


def figure(metrics: Mapping[str, Any], *keys: str) -> float | None:
    """The figure under nested keys; None where it was not measured."""
    value: Any = metrics
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"metrics: {'.'.join(keys)} should be a figure or null, not {value!r}")
    return value


def section(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping under a key; an empty one where it is missing or null."""
    return metrics.get(key) or {}


def blocks(metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The finished blocks, in the model's order."""
    return metrics.get("blocks") or []


def layer_sparsities(metrics: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """The share of zeros of every linear layer, by name and then by block; None where a block has no such layer.

    Layers whose names differ in a number alone, such as experts, are one: `mlp.experts.*.up_proj`.
    """
    counts: dict[str, dict[int, tuple[int, int]]] = {}
    for place, block in enumerate(blocks(metrics)):
        for name, layer in section(block, "layers").items():
            row = counts.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), {})
            zeros, weights = row.get(place, (0, 0))
            row[place] = (zeros + layer["zeros"], weights + layer["weights"])
    shares = {name: {place: zeros / weights for place, (zeros, weights) in row.items()} for name, row in counts.items()}
    return {name: [row.get(place) for place in range(len(blocks(metrics)))] for name, row in shares.items()}


def trainings(metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The trainings of blocks, windows of blocks or parts of them, in their order."""
    return metrics.get("trainings") or []


def losses(training: Mapping[str, Any], kind: str) -> Sequence[float | None]:
    """A training's losses: "train" (one an epoch) or "held_out" (the start comes first)."""
    return section(training, "loss").get(kind) or []


def best_epochs(metrics: Mapping[str, Any], block: int) -> list[int | None]:
    """The epochs whose weights were kept in a block's last round: one for each of its parts, or for all of it."""
    own = [training for training in trainings(metrics) if block in training["blocks"]]
    return [training.get("best_epoch") for training in own if training["round"] == own[-1]["round"]]


def diverged(metrics: Mapping[str, Any]) -> list[str]:
    """The trainings whose loss was no number at last, or higher than in their first epoch."""
    found = []
    for training in trainings(metrics):
        first, *_, last = [*losses(training, "train")[:1], *losses(training, "train")] or [0.0, 0.0]
        if last is None or not math.isfinite(last) or (first is not None and last > first):
            found.append(training["name"])
    return found


def is_reconstructed(metrics: Mapping[str, Any]) -> bool:
    """Whether weights were trained after masking."""
    return section(metrics, "method").get("reconstruction") not in (None, "none")


def drawable(values: Sequence[float | None]) -> list[float]:
    """The values for a logarithmic axis: NaN, which leaves a gap, for whatever has no place on one."""
    return [value if value is not None and math.isfinite(value) and value > 0 else math.nan for value in values]


def error_curves(metrics: Mapping[str, Any]) -> list[ErrorCurve]:
    """The errors of all blocks, on calibration and held-out text, before and after reconstruction.

    Without reconstruction there is no after, and one curve a text is left.
    """
    moments = ("before", "after") if is_reconstructed(metrics) else ("before",)
    return [
        ErrorCurve(text, moment, [figure(block, key, moment) for block in blocks(metrics)])
        for text, key in (("calibration", "error"), ("held-out", "validation_error"))
        for moment in moments
    ]


def spikes(metrics: Mapping[str, Any]) -> list[Spike]:
    """The blocks whose error in any curve is above `SPIKE_FACTOR` times the median of its neighbours."""
    found: dict[int, Spike] = {}
    # What is left after reconstruction is what a reader asks for first; before, only where that is no spike.
    for curve in sorted(error_curves(metrics), key=lambda curve: curve.moment == "before"):
        errors = drawable(curve.errors)
        for position, error in enumerate(errors):
            around = errors[max(0, position - NEIGHBOURS) : position] + errors[position + 1 :][:NEIGHBOURS]
            around = [neighbour for neighbour in around if not math.isnan(neighbour)]
            if len(around) < 2:  # one neighbour cannot tell which of the two is out of line
                continue
            if error > SPIKE_FACTOR * median(around):
                block = blocks(metrics)[position]["index"]
                found.setdefault(block, Spike(block, error, median(around), curve))
    return [found[block] for block in sorted(found)]


def zero_blocks(metrics: Mapping[str, Any]) -> list[int]:
    """The blocks with an error of exactly 0, which a logarithmic axis cannot show."""
    curves = error_curves(metrics)
    return [
        block["index"]
        for position, block in enumerate(blocks(metrics))
        if any(curve.errors[position] == 0 for curve in curves)
    ]
