"""TensorBoard: one run a block, so that the curves of all blocks lie in one chart, and runs that sum up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lit_prune.reporting.reading import figure, section


class Board:
    """The `tensorboard/` folder of a run.

    Runs `block_00`, `block_01`, ... hold the training and the held-out loss under one tag each. Runs `masked` and
    `reconstructed` hold every block's error (step = block), so that before and after lie in one chart. Runs `dense`,
    `masked` and `reconstructed` hold the perplexities, and the last the hyperparameters.

    Args:
        folder: where the runs lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loggers: dict[str, TensorBoardLogger] = {}

    def run(self, name: str) -> TensorBoardLogger:
        """The logger of one TensorBoard run."""
        if name not in self._loggers:
            self._loggers[name] = TensorBoardLogger(self._folder.parent, self._folder.name, version="", sub_dir=name)
        return self._loggers[name]

    def block(self, figures: Mapping[str, Any]) -> None:
        """Log one block's error before and after reconstruction."""
        for name, moment in (("masked", "before"), ("reconstructed", "after")):
            errors = {
                "block_error/calibration": figures["error"][moment],
                "block_error/held_out": figures["validation_error"][moment],
            }
            self.run(name).log_metrics(_measured(errors), step=figures["index"])

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Log perplexities and hyperparameters, and close all runs."""
        for name, stage in (("dense", "dense"), ("masked", "masked"), ("reconstructed", "pruned")):
            perplexity = metrics["perplexity"][stage] or {}
            self.run(name).log_metrics({f"perplexity/{text}": value for text, value in perplexity.items()}, step=0)
        hyperparameters = {"checkpoint": metrics["checkpoint"], **metrics["method"], **metrics["calibration"]}
        figures = {
            f"summary/perplexity_{text}": value for text, value in (metrics["perplexity"]["pruned"] or {}).items()
        }
        figures |= {"summary/error": metrics["error"], "summary/sparsity": metrics["sparsity"]}
        self.run("reconstructed").log_hyperparams(hyperparameters, _measured(figures))
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


def _measured(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
