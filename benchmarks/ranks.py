"""Seconds of a run on one process and on several, in turn, each process with one thread.

The quickstart's model, with few short sequences and without perplexity: what is measured is how the work of a run is
shared, for blocks that are trained together (DDP) and for independent ones, which are trained apart. Processes on one
machine share its caches, memory and clock rate. So as many separate runs of one process each take their turn, too, all
at once: that is the work of several at the speed that the machine has when several are at work, and no run that is
shared out can be faster.

    python benchmarks/ranks.py [--processes 2] [--repeat 3] [--samples 16] [--only apart]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
FORMS = {"BR + GP, DDP": ["--model.independent=false"], "independent, blocks apart": ["--model.independent=true"]}
STAGES = ("reconstruct", "total")

Seconds = dict[str, float]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", default="", help="part of a form's name")
    arguments = parser.parse_args()
    several, forms = arguments.processes, [form for form in FORMS if arguments.only in form]
    ways = {"alone": (1, 1), "shared": (1, several), "separate": (several, 1)}
    taken: dict[str, list[dict[str, Seconds]]] = {form: [] for form in forms}
    for _ in range(arguments.repeat):
        for form in forms:
            taken[form].append({way: measure(form, *how, arguments.samples) for way, how in ways.items()})
    print(
        f"| | stage | 1 process | {several} processes | {several} separate runs at once | times as fast "
        "| the machine's limit |\n|---|---|---|---|---|---|---|"
    )
    for form in forms:
        for stage in STAGES:
            alone, shared, separate = ([one[way][stage] for one in taken[form]] for way in ways)
            faster = [a / b for a, b in zip(alone, shared, strict=True)]
            limit = [several * a / b for a, b in zip(alone, separate, strict=True)]
            seconds = " | ".join(f"{median(some):.1f} s" for some in (alone, shared, separate))
            print(f"| {form} | {stage} | {seconds} | {spread(faster)} | {spread(limit)} |", flush=True)


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def measure(form: str, runs: int, processes: int, samples: int) -> Seconds:
    """The seconds by stage of runs that begin at once, of the one that takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "lit-prune"), "fit", "--config", f"{ROOT}/configs/quickstart.yaml"]
        command += [f"--data.samples={samples}", "--data.validation_samples=2", "--data.sequence_length=256"]
        command += ["--data.batch_size=2", "--evaluation.texts=[]", "--trainer.accelerator=cpu", *FORMS[form]]
        command += [f"--trainer.devices={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        folders = [f"{folder}/{run}" for run in range(runs)]
        begun = [subprocess.Popen([*command, f"--output_dir={one}"], env=environment, **quiet) for one in folders]  # noqa: S603
        if any([run.wait() for run in begun]):  # noqa: C419 - all of them are waited for
            raise RuntimeError(f"a run failed: {' '.join(command)}")
        taken = [json.loads(Path(one, "metrics.json").read_text())["seconds"] for one in folders]
    return max(taken, key=lambda seconds: float(seconds["total"]))


if __name__ == "__main__":
    main()
