"""The paper's comparison (Shin et al., arXiv 2406.15524) on SmolLM2-135M: masks by forms of reconstruction.

Every cell is a run of `lit-prune fit` with the quickstart's model and text, 32 calibration and 8 held-out sequences of
256 tokens, and perplexity on two texts of different source. Its figures go to `benchmarks/paper/CELL.json` as soon as
it is finished; a run that was stopped goes on where it was. The tables and the figure of all cells that are there are
written to `docs/paper/`.

    python benchmarks/paper.py [--only NAME ...] [--part 1/2] [--table] [--self_generated FILE]

A cell is named MASK-FORM-SPARSITY-DRAW, with the name of a variant behind it where something else is changed, such as
Wanda-BR+GP-0.5-0 or Wanda-BR+GP-0.5-0-own; `--only` takes names and patterns of them, such as 'Wanda-*-0.7-0'.
`--part 1/2` and `--part 2/2` in two processes share the cells; their seconds are those of a machine that is shared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lit_prune.atomic import write_text

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix("")
RUNS, DOCS = ROOT / "runs" / "paper", ROOT / "docs" / "paper"
TEXTS = "package://exllamav3==1.6.5/exllamav3/conversion/standard_cal_data/{}.utf8?sha256={}"
SHA256 = "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded"
FORMS = {
    "LR": ["--model.reconstruction", "none"],
    "BR": ["--model.reconstruction", "block", "--model.global_propagation", "false"],
    "BR+GP": ["--model.reconstruction", "block"],
    "BR+GP+CR": ["--model.reconstruction", "cross_block"],
}
MASKS = ("Wanda", "ADMM", "SparseGPT", "Magnitude")
SETTINGS = ["--data.samples", "32", "--data.validation_samples", "8", "--data.sequence_length", "256"]
OPTIONS = {
    "batch": "--data.batch_size",
    "epochs": "--trainer.max_epochs",
    "lr": "--optimizer.lr",
    "matmul": "--float32_matmul_precision",
    "loss": "--model.loss",
    "allocation": "--model.allocation",
    "window": "--model.window",
    "stride": "--model.stride",
    "own": "--data.self_generated_samples",
    "errors": "--evaluation.errors",
}
"""What a variant may change, as key=value pairs; `own` is sequences of self-generated text beside the 32 real ones, and
errors=false spares a pass through each block, since the blocks' errors are not measured."""
ERRORS = ("error", "validation_error")
"""Of a block, on calibration and on held-out text."""
STEPS = {"batch": "2", "lr": "2e-3"}
"""Tuned once, on Wanda with BR + GP, with the epochs: see `TUNING`."""
EPOCHS = {"LR": "3", "BR": "3", "BR+GP": "3", "BR+GP+CR": "2"}
"""With CR each block is trained in two windows, so 4 epochs in all; with 3 each, a cell would take 10 minutes."""
TUNING = [
    f"batch={batch},epochs={epochs},lr={rate}"
    for batch, epochs, rate in ((1, 2, 1e-3), (1, 2, 2e-3), (2, 2, 2e-3), (2, 2, 4e-3), (2, 10, 2e-3))
]
LOSSES = ["loss=relative", "loss=cosine"]
RATES = ["lr=0.001", "lr=0.0005"]
"""With the losses, over three draws: what matters more, the loss or the size of the steps?"""
SEARCH = [
    "ADMM-BR+GP-0.5-0-loss=relative",
    "ADMM-BR+GP-0.5-0-loss=cosine",
    "ADMM-BR+GP-0.5-0-own=32,epochs=2,lr=0.001",
    "ADMM-BR+GP-0.5-0-own=96,epochs=2,lr=0.001,matmul=medium",
    "ADMM-BR+GP+CR-0.5-0-own=96,epochs=2,lr=0.001,window=3,stride=3,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=96,epochs=2,lr=0.001,matmul=medium,allocation=ByError",
    "ADMM-BR+GP-0.5-0-own=96,epochs=2,lr=0.001,matmul=medium,loss=cosine",
    "ADMM-BR+GP-0.5-0-own=96,epochs=2,lr=0.002,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=240,epochs=2,lr=0.001,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=240,epochs=2,lr=0.002,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=240,epochs=2,lr=0.003,matmul=medium,allocation=ByError",
    "ADMM-BR+GP-0.5-0-own=480,epochs=1,lr=0.002,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=480,epochs=1,lr=0.003,matmul=medium",
    "ADMM-BR+GP-0.7-0-own=240,epochs=2,lr=0.002,matmul=medium",
    "ADMM-BR+GP-2:4-0-own=240,epochs=2,lr=0.002,matmul=medium",
    "ADMM-BR+GP-0.5-0-own=480,epochs=1,lr=0.002,matmul=medium,loss=relative,errors=false",
    "ADMM-BR+GP-2:4-0-own=480,epochs=1,lr=0.002,matmul=medium",
]
"""What may come nearest to half of SparseGPT's loss within ten minutes."""
OWN = {"LR": ("16", "3"), "BR": ("16", "2"), "BR+GP": ("16", "2"), "BR+GP+CR": ("32", "1")}
"""Sequences of self-generated text beside the 32 real ones, and epochs: the steps are as many as without."""


def cells() -> list[str]:
    """Names of all cells, what matters most first."""
    tuning = [f"Wanda-BR+GP-0.5-0-{variant}" for variant in TUNING]
    half = [f"{mask}-{form}-0.5-0" for mask in MASKS for form in FORMS]
    draws = [f"Wanda-{form}-0.5-{draw}" for draw in (1, 2) for form in FORMS]
    steps = [f"Wanda-BR+GP-0.5-{draw}-{variant}" for draw in range(3) for variant in LOSSES + RATES]
    steps += [f"Wanda-BR+GP-0.7-0-{variant}" for variant in LOSSES]
    own = [f"Wanda-{form}-0.5-{draw}-own" for draw in range(3) for form in FORMS]
    sparser = [f"{mask}-{form}-{s}-0" for s in ("0.7", "2:4") for mask in ("Wanda", "ADMM") for form in FORMS]
    return tuning + SEARCH + half + draws + steps + own + sparser


def main() -> None:
    """Measure what is missing, then write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of cells, or patterns of them")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2: two processes share the work")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--self_generated", default="", help="what `lit-prune generate` wrote with the same model")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    for cell in [] if arguments.table else cells()[part - 1 :: parts]:
        chosen = any(fnmatchcase(cell, pattern) for pattern in arguments.only)
        if chosen and not measured(cell):
            if "own" in training(cell) and not arguments.self_generated:
                print(f"{cell}: left out, since it needs --self_generated")
            else:
                measure(cell, arguments.self_generated)
    found = {cell: json.loads(result(cell).read_text()) for cell in cells() if measured(cell)}
    DOCS.mkdir(parents=True, exist_ok=True)
    write_text(DOCS / "table.md", table(found))
    with rc_context({"svg.hashsalt": "paper"}):  # the same file for the same figures
        figure(found).savefig(DOCS / "errors.svg", metadata={"Date": None})
    print(table(found))


def result(cell: str) -> Path:
    """Where a cell's figures are."""
    return RESULTS / f"{cell.replace(':', 'of')}.json"


def parts_of(cell: str) -> list[str]:
    """Mask, form, sparsity, draw, and variant, which may be empty."""
    return [*cell.split("-", 4), ""][:5]


def training(cell: str) -> dict[str, str]:
    """How a cell's blocks are trained, by the keys of `OPTIONS`."""
    _, form, _, _, variant = parts_of(cell)
    changed = dict(pair.split("=") for pair in variant.split(",") if "=" in pair)
    if variant == "own":
        changed = dict(zip(("own", "epochs"), OWN[form], strict=True))
    return STEPS | {"epochs": EPOCHS[form]} | changed


def measured(cell: str) -> bool:
    """Whether a cell's figures are there, and those of the training that it stands for."""
    return result(cell).exists() and json.loads(result(cell).read_text()).get("training") == training(cell)


def measure(cell: str, self_generated: str) -> None:
    """Run a cell, or go on with it, and keep its figures."""
    mask, form, sparsity, draw, _ = parts_of(cell)
    texts = ", ".join(TEXTS.format(name, SHA256) for name in ("wiki", "technical"))
    folder = RUNS / cell.replace(":", "of")
    command = ["lit-prune", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--output_dir", str(folder)]
    command += ["--model.mask", mask, "--model.sparsity", sparsity, *FORMS[form], *SETTINGS]
    command += ["--data.seed", draw, "--seed_everything", draw, "--evaluation.texts", f"[{texts}]"]
    for key, value in training(cell).items():
        command += [OPTIONS[key], value]
    if "own" in training(cell):
        command += ["--data.self_generated", self_generated]
    if cell != "Wanda-LR-0.5-0":  # the dense model is the same for all
        command += ["--evaluation.references", "false"]
    print(cell, flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)  # noqa: S603
    metrics = json.loads((folder / "metrics.json").read_text())
    if metrics["calibration"]["self_generated"]:
        texts = [json.loads(line) for line in Path(self_generated).read_text().splitlines()]
        metrics["calibration"]["self_generated"] = texts[0]["generated"] | {"texts": len(texts)}
    keys = ("method", "calibration", "sparsity", "error", "seconds", "peak_memory_bytes", "perplexity", "versions")
    blocks = [{key: block[key] for key in ("index", "error", "validation_error")} for block in metrics["blocks"]]
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    RESULTS.mkdir(exist_ok=True)
    losses = [{"loss": one["loss"], "best_epoch": one["best_epoch"]} for one in metrics["trainings"]]
    figures = {"training": training(cell)} | {key: metrics[key] for key in keys}
    figures |= {"blocks": blocks, "losses": losses, "threads": threads}
    write_text(result(cell), json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(folder)


def rows(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Masks, sparsities and draws of which there are figures: the names of their cells, by form."""
    named = {}
    for mask, sparsity, draw, variant in dict.fromkeys((mask, *rest) for mask, _, *rest in map(parts_of, found)):
        if variant in ("", "own"):
            words = f"{mask}, {sparsity}, draw {draw}" + (", self-generated text added" if variant else "")
            named[words] = {form: "-".join(filter(None, [mask, form, sparsity, draw, variant])) for form in FORMS}
    return named


def table(found: dict[str, dict[str, Any]]) -> str:
    """The forms of every mask and sparsity side by side, variants of training, what forms change, means over draws."""
    lines = [
        "# Masks by forms of reconstruction",
        "",
        "Error of the last block on calibration / held-out text; perplexity on Wikipedia / technical text.",
        "",
        f"| mask, sparsity, draw | {' | '.join(FORMS)} |",
        f"|---|{'---|' * len(FORMS)}",
    ]
    for words, names in rows(found).items():
        lines.append(f"| {words} | {' | '.join(shown(found.get(name)) for name in names.values())} |")
    lines += ["", "| mask | form | sparsity | draw | training | |", "|---|---|---|---|---|---|"]
    varied = {tuple(parts_of(cell)[:4]) for cell in found if "=" in cell}
    for cell, metrics in found.items():
        *setting, variant = parts_of(cell)
        if tuple(setting) in varied and variant != "own":
            lines.append(f"| {' | '.join(setting)} | {variant or 'as above'} | {shown(metrics)} |")
    lines += ["", *changes(found), "", *over_draws(found)]
    dense = [metrics["perplexity"]["dense"] for metrics in found.values() if metrics["perplexity"]["dense"]]
    if dense:
        lines += ["", f"Dense: perplexity {' / '.join(f'{value:.2f}' for value in dense[0].values())}."]
    return "\n".join(lines) + "\n"


def changes(found: dict[str, dict[str, Any]]) -> list[str]:
    """What each form changes in the last block's error against the one before it, and how far it overfits."""
    steps = list(pairwise(FORMS))
    lines = [
        "By how much a form lowers the last block's error, on calibration / held-out text, and the ratio of the two:",
        "",
        f"| mask, sparsity, draw | {' | '.join(f'{a} to {b}' for a, b in steps)} | in all | held-out to calibration |",
        f"|---|{'---|' * len(steps)}---|---|",
    ]
    for words, names in rows(found).items():
        if not all(name in found for name in names.values()):
            continue
        both = {form: [found[n]["blocks"][-1][k]["after"] for k in ERRORS] for form, n in names.items()}
        lowered = [
            " / ".join(f"{1 - y / x:.0%}" for x, y in zip(both[a], both[b], strict=True))
            for a, b in [*steps, (steps[0][0], steps[-1][-1])]
        ]
        ratios = ", ".join(f"{held_out / seen:.2f}" for seen, held_out in both.values())
        lines.append(f"| {words} | {' | '.join(lowered)} | {ratios} |")
    return lines


def over_draws(found: dict[str, dict[str, Any]]) -> list[str]:
    """Wanda with BR + GP at 50 %: the loss and the learning rate, each over three draws."""
    lines = ["Wanda, BR+GP, 0.5, mean over three draws:", "", "| training | perplexity | error |", "|---|---|---|"]
    for variant in ["", *LOSSES, *RATES]:
        names = ["-".join(filter(None, ["Wanda-BR+GP-0.5", str(draw), variant])) for draw in range(3)]
        draws = [found[name] for name in names if name in found]
        if len(draws) == len(names):
            texts = zip(*(one["perplexity"]["pruned"].values() for one in draws), strict=True)
            perplexities = " / ".join(f"{fmean(values):.2f} ({min(values):.1f}-{max(values):.1f})" for values in texts)
            errors = " / ".join(f"{fmean(one['blocks'][-1][key]['after'] for one in draws):.0f}" for key in ERRORS)
            lines.append(f"| {variant or 'as above'} | {perplexities} | {errors} |")
    return lines


def shown(metrics: dict[str, Any] | None) -> str:
    """One cell of the table."""
    if metrics is None:
        return "not measured"
    last = [metrics["blocks"][-1][key]["after"] for key in ERRORS]
    perplexities = " / ".join(f"{value:.1f}" for value in metrics["perplexity"]["pruned"].values())
    return f"{' / '.join('-' if error is None else f'{error:.3g}' for error in last)}; {perplexities}"


def figure(found: dict[str, dict[str, Any]]) -> Figure:
    """The error of every block, calibration and held-out, for each mask at 50 %."""
    masks = [mask for mask in MASKS if any(cell.startswith(f"{mask}-") and cell.endswith("-0.5-0") for cell in found)]
    drawing = Figure(figsize=(1 + 2.6 * len(masks), 3.2), layout="constrained")
    for axes, mask in zip(drawing.subplots(1, len(masks), sharey=True, squeeze=False)[0], masks, strict=True):
        axes.set(title=mask, xlabel="block", yscale="log")
        for colour, form in zip(("0.55", "tab:orange", "tab:blue", "tab:green"), FORMS, strict=True):
            metrics = found.get(f"{mask}-{form}-0.5-0")
            for key, style in (("error", "-"), ("validation_error", ":")):
                errors = [block[key]["after"] for block in metrics["blocks"]] if metrics else []
                axes.plot(errors, style, color=colour, label=form if style == "-" else None)
    drawing.axes[0].set_ylabel("error (dotted: held-out)")
    drawing.axes[0].legend()
    return drawing


if __name__ == "__main__":
    main()
