"""Seconds of a run on one process and on two, in turn, each process with one thread.

The quickstart's model, with few short sequences and without perplexity: what is measured is how the work of a run is
shared, for blocks that are trained together (DDP) and for independent ones, which are trained apart.

    python benchmarks/ranks.py [--processes 2] [--repeat 3] [--samples 16]
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


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    counts = (1, arguments.processes)
    taken: dict[tuple[str, int], list[dict[str, float]]] = {(form, count): [] for form in FORMS for count in counts}
    for _ in range(arguments.repeat):
        for (form, count), seconds in taken.items():
            seconds.append(measure(form, count, arguments.samples))
    print(f"| | stage | 1 process | {arguments.processes} processes | times as fast, least - most |")
    print("|---|---|---|---|---|")
    for form in FORMS:
        for stage in STAGES:
            one, several = ([seconds[stage] for seconds in taken[form, count]] for count in counts)
            ratios = [a / b for a, b in zip(one, several, strict=True)]
            print(
                f"| {form} | {stage} | {median(one):.1f} s | {median(several):.1f} s "
                f"| {median(ratios):.2f}, {min(ratios):.2f} - {max(ratios):.2f} |"
            )


def measure(form: str, processes: int, samples: int) -> dict[str, float]:
    """The seconds of one run by stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "lit-prune"), "fit", "--config", f"{ROOT}/configs/quickstart.yaml"]
        command += [f"--data.samples={samples}", "--data.validation_samples=2", "--data.sequence_length=256"]
        command += ["--data.batch_size=2", "--evaluation.texts=[]", "--trainer.accelerator=cpu", *FORMS[form]]
        command += [f"--trainer.devices={processes}", f"--output_dir={folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True)  # noqa: S603
        seconds: dict[str, float] = json.loads(Path(folder, "run", "metrics.json").read_text())["seconds"]
        return seconds


if __name__ == "__main__":
    main()
