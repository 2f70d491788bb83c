"""Worker: `lit-prune fit`, as on the command line, but with our tokens instead of those it would draw from the text."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.peers.cells import SEQUENTIAL
from benchmarks.peers.worker import Clock, work

TEXT = Path(__file__).parent.parent.parent / "tiny" / "text" / "calibration.txt"
"""Never read: the tokens come from the job."""

FORMS = {
    "BR": ["Wanda", "block", "false"],
    "BR+GP": ["Wanda", "block", "true"],
    "recipe": ["Wanda", "none", "false"],  # and whatever the recipe says
}
"""Mask, reconstruction and global propagation, of what is more than a mask."""

TRAINING = ["--data.batch_size=8", "--optimizer.lr=2e-4", "--lr_scheduler=linear"]
"""The paper's, which are lit-prune's defaults too; said for what reads the job."""


def command(job: dict[str, Any]) -> list[str]:
    """The arguments of the verb."""
    mask, form, propagation = FORMS.get(job["method"], [job["method"], "none", "false"])
    settings = [f"--model.mask={mask}", f"--model.reconstruction={form}", f"--model.global_propagation={propagation}"]
    settings += [*TRAINING, f"--trainer.max_epochs={job['epochs']}", f"--data.samples={job['samples']}"]
    settings += ["--data.validation_samples=0", f"--data.sequence_length={job['length']}", f"--data.source={TEXT}"]
    settings += ["--evaluation.texts=[]", "--evaluation.references=false", "--evaluation.errors=false"]
    settings += [f"--model.sparsity={job['sparsity']}", f"--model.checkpoint={job['model']}", "--model.offload=true"]
    settings += ["--model.true_sequential=true"] * (job.get("tool") == SEQUENTIAL)
    settings += job.get("recipe", [])
    settings += [f"--data.self_generated={job['own']}", f"--data.seed={job['draw']}"] if job.get("own") else []
    return ["fit", *settings, f"--output_dir={job['run']}", "--trainer.accelerator=cpu"]


def prune(job: dict[str, Any], clock: Clock) -> dict[str, str]:
    """Prune, and reconstruct if the method is a form of reconstruction; stages as `metrics.json` has them."""
    with clock("import"):
        import lit_prune.fit  # noqa: F401 - the verb, which the command line imports late
        from lit_prune import resources
        from lit_prune.cli import main
        from lit_prune.data import CalibrationText

    def given(data: CalibrationText, *_: Any) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        tokens = load_file(job["tokens"])["tokens"]
        assert len(tokens) == data.samples + data.validation_samples, "a recipe must share out the same tokens"
        return tokens[: data.samples], tokens[data.samples :]

    # stages' own peaks are taken by forgetting the process's peak, which is what is measured here
    with (
        patch.object(CalibrationText, "_drawn", given),
        patch.object(resources, "_peak_since_last", resources.peak_memory_bytes),
    ):
        try:
            main(command(job))
        except SystemExit as end:
            if end.code:
                raise
    metrics = json.loads((Path(job["run"]) / "metrics.json").read_text())
    seconds = {stage: value for stage, value in metrics["seconds"].items() if value}
    seconds["prune"] = seconds.pop("total") - seconds["load"] - seconds["save"]
    clock.seconds |= seconds
    (Path(job["run"]) / "model").rename(job["result"])
    versions: dict[str, str] = metrics["versions"]
    return {name: versions[name] for name in ("lit_prune", "torch", "transformers") if name in versions}


if __name__ == "__main__":
    work(prune)
