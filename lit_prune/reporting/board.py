"""TensorBoard: one run a block, so that the curves of all blocks lie in one chart, and runs that sum up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lit_prune.reporting.reading import figure, section
from lit_prune.reporting.style import raster

STAGES = {"dense": "dense", "masked": "masked", "reconstructed": "pruned"}
"""The runs that sum up, and the stage whose perplexity each holds."""


class Board:
    """The `tensorboard/` folder of a run.

    Runs `block_00`, `block_01`, ... hold the training and the held-out loss under one tag each. Runs `masked` and
    `reconstructed` hold every block's error (step = block), so that before and after lie in one chart. Runs `dense`,
    `masked` and `reconstructed` hold the perplexities, and the last the hyperparameters and the
    report's plots as images.

    Args:
        folder: where the runs lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loggers: dict[str, TensorBoardLogger] = {}

    def run(self, name: str) -> TensorBoardLogger:
        """The logger of one TensorBoard run."""
        if name not in self._loggers:
            self._loggers[name] = _Curves(self._folder.parent, self._folder.name, version="", sub_dir=name)
        return self._loggers[name]

    def block(self, figures: Mapping[str, Any]) -> None:
        """Log one block's error before and after reconstruction."""
        for name, moment in (("masked", "before"), ("reconstructed", "after")):
            errors = {
                "block_error/calibration": figures["error"][moment],
                "block_error/held_out": figures["validation_error"][moment],
            }
            self.run(name).log_metrics(_measured(errors), step=figures["index"])

    def summarise(self, metrics: Mapping[str, Any], plots: Mapping[str, Figure]) -> None:
        """Log perplexities, plots, and hyperparameters with the figures they led to, and close all runs.

        Args:
            metrics: of the finished run.
            plots: by name; they become images.
        """
        for name, stage in STAGES.items():
            perplexity = metrics["perplexity"][stage] or {}
            self.run(name).log_metrics({f"perplexity/{text}": value for text, value in perplexity.items()}, step=0)
        for name, picture in plots.items():
            self.run("reconstructed").experiment.add_image(f"plots/{name}", raster(picture), 0, dataformats="HWC")
        self.run("reconstructed").log_hyperparams(hyperparameters(metrics), outcome(metrics))
        self._close()

    def evaluated(self, evaluation: Mapping[str, Any]) -> None:
        """Log what `lit-prune evaluate` found of the finished run, the dense model's figures beside it."""
        for name, stage in (("dense", "dense"), ("reconstructed", "pruned")):
            figures = {
                f"evaluation/perplexity_{text}": figure(found, stage)
                for text, found in section(evaluation, "perplexity").items()
            }
            zero_shot = section(evaluation, "zero_shot")
            for task, found in section(zero_shot, "tasks").items():
                figures[f"zero_shot/{task}"] = figure(found, stage, "value")
            figures["zero_shot/mean"] = figure(zero_shot, "mean", stage)
            self.run(name).log_metrics(_measured(figures), step=0)
        for text, found in section(evaluation, "divergence").items():
            divergence = {f"divergence/{key}_{text}": figure(found, key) for key in ("kl", "top1_agreement")}
            self.run("reconstructed").log_metrics(_measured(divergence), step=0)
        self._close()

    def _close(self) -> None:
        for logger in self._loggers.values():
            logger.finalize("success")
        self._loggers.clear()


class _Curves(TensorBoardLogger):
    """Without the tag `epoch`, which Lightning adds to all that is logged: a chart of straight lines."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({tag: value for tag, value in metrics.items() if tag != "epoch"}, step)


def hyperparameters(metrics: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The settings that TensorBoard's table compares runs by: numbers as numbers, the same columns for every run."""
    settings = {"checkpoint": metrics["checkpoint"], **metrics["method"], **metrics["calibration"]}
    return {name: _plain(value) for name, value in settings.items()}


def outcome(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that they led to, as far as they were measured: a perplexity for every text, errors, cost."""
    last = metrics["blocks"][-1] if metrics["blocks"] else {}
    figures = {
        **{f"summary/perplexity_{text}": value for text, value in (metrics["perplexity"]["pruned"] or {}).items()},
        "summary/error": metrics["error"],
        "summary/held_out_error": figure(last, "validation_error", "after"),
        "summary/sparsity": metrics["sparsity"],
        "summary/seconds": figure(metrics, "seconds", "total"),
        "summary/host_memory_gb": _giga(figure(metrics, "peak_memory_bytes", "host")),
        "summary/device_memory_gb": _giga(figure(metrics, "peak_memory_bytes", "device")),
    }
    return _measured(figures)


def _plain(value: Any) -> int | float | str:
    """A setting as the table takes it: `0.6`, which is a number; `2:4`, which is none; lists and nothing as words."""
    if isinstance(value, bool):
        return str(value).lower()  # or the table would show 1.0
    if isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    try:
        return float(value)
    except (TypeError, ValueError):
        return "none" if value is None else str(value)


def _giga(count: float | None) -> float | None:
    return None if count is None else count / 1e9


def _measured(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
