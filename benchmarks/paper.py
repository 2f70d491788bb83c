"""The paper's comparison (Shin et al., arXiv 2406.15524) on SmolLM2-135M: masks by forms of reconstruction.

Every cell is a run of `lit-prune fit` with the quickstart's model and text, 32 calibration and 8 held-out sequences of
256 tokens, and perplexity on two texts of different source. Its figures go to `benchmarks/paper/CELL.json` as soon as
it is finished; a run that was stopped goes on where it was. The table and the figure of all cells that are there are
written to `docs/paper/`.

    python benchmarks/paper.py [--only TEXT ...] [--limit N] [--table] [--self_generated FILE]

A cell is named MASK-FORM-SPARSITY-DRAW, with -own behind it where self-generated text is added, such as
Wanda-BR+GP-0.5-0; `--only` takes those whose name holds one of the texts.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
MASKS = ("Magnitude", "Wanda", "SparseGPT", "ADMM")
SETTINGS = ["--data.samples", "32", "--data.validation_samples", "8", "--data.sequence_length", "256"]
SETTINGS += ["--data.batch_size", "2", "--trainer.max_epochs", "4", "--optimizer.lr", "1e-3"]
"""Tuned once, on Wanda with BR + GP: see docs/paper."""
OWN_SAMPLES = 32


def cells() -> list[str]:
    """Names of all cells, what matters most first."""
    half = [f"{mask}-{form}-0.5-0" for mask in ("Wanda", "ADMM", "SparseGPT", "Magnitude") for form in FORMS]
    draws = [f"Wanda-{form}-0.5-{draw}" for draw in (1, 2) for form in FORMS]
    own = [f"Wanda-{form}-0.5-{draw}-own" for draw in (0, 1, 2) for form in FORMS]
    sparser = [f"{mask}-{form}-{s}-0" for s in ("0.7", "2:4") for mask in ("Wanda", "ADMM") for form in FORMS]
    return half + draws + own + sparser


def main() -> None:
    """Measure what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cells' names")
    parser.add_argument("--limit", type=int, default=1000, help="at most so many cells")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--self_generated", default="", help="what `lit-prune generate` wrote with the same model")
    arguments = parser.parse_args()
    missing = [cell for cell in cells() if any(text in cell for text in arguments.only) and not result(cell).exists()]
    if not arguments.self_generated:
        missing = [cell for cell in missing if not cell.endswith("-own")]
    for cell in [] if arguments.table else missing[: arguments.limit]:
        measure(cell, arguments.self_generated)
    found = {cell: json.loads(result(cell).read_text()) for cell in cells() if result(cell).exists()}
    DOCS.mkdir(parents=True, exist_ok=True)
    write_text(DOCS / "table.md", table(found))
    figure(found).savefig(DOCS / "errors.svg")
    print(table(found))


def result(cell: str) -> Path:
    """Where a cell's figures are."""
    return RESULTS / f"{cell.replace(':', 'of')}.json"


def measure(cell: str, self_generated: str) -> None:
    """Run a cell, or go on with it, and keep its figures."""
    mask, form, sparsity, draw, *own = cell.split("-")
    texts = ", ".join(TEXTS.format(name, SHA256) for name in ("wiki", "technical"))
    folder = RUNS / cell.replace(":", "of")
    command = ["lit-prune", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--output_dir", str(folder)]
    command += ["--model.mask", mask, "--model.sparsity", sparsity, *FORMS[form], *SETTINGS]
    command += ["--data.seed", draw, "--seed_everything", draw, "--evaluation.texts", f"[{texts}]"]
    if own:
        command += ["--data.self_generated", self_generated, "--data.self_generated_samples", str(OWN_SAMPLES)]
    print(cell, flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)  # noqa: S603
    metrics = json.loads((folder / "metrics.json").read_text())
    keys = ("method", "calibration", "sparsity", "error", "seconds", "peak_memory_bytes", "perplexity", "versions")
    blocks = [{key: block[key] for key in ("index", "error", "validation_error")} for block in metrics["blocks"]]
    RESULTS.mkdir(exist_ok=True)
    write_text(result(cell), json.dumps({key: metrics[key] for key in keys} | {"blocks": blocks}, indent=1) + "\n")
    shutil.rmtree(folder)


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line a mask and sparsity, one column a form: last block's error on both texts, and perplexities."""
    rows = dict.fromkeys((mask, *rest) for mask, _, *rest in (cell.split("-") for cell in found))
    lines = [
        "Error of the last block on calibration / held-out text, and perplexity on Wikipedia / technical text.",
        "",
    ]
    lines += [f"| mask, sparsity, draw | {' | '.join(FORMS)} |", f"|---|{'---|' * len(FORMS)}"]
    for mask, *rest in rows:
        figures = [found.get("-".join([mask, form, *rest])) for form in FORMS]
        words = f"{mask}, {rest[0]}, draw {rest[1]}" + (", with self-generated text" if len(rest) > 2 else "")
        lines.append(f"| {words} | {' | '.join(map(shown, figures))} |")
    if found:
        dense = next(iter(found.values()))["perplexity"]["dense"]
        lines += ["", f"Dense: perplexity {' / '.join(f'{value:.2f}' for value in dense.values())}."]
    return "\n".join(lines) + "\n"


def shown(metrics: dict[str, Any] | None) -> str:
    """One cell of the table."""
    if metrics is None:
        return "not measured"
    last = metrics["blocks"][-1]
    perplexities = " / ".join(f"{value:.1f}" for value in metrics["perplexity"]["pruned"].values())
    errors = f"{last['error']['after']:.3g} / {last['validation_error']['after']:.3g}"
    return f"{errors}; {perplexities}; {metrics['seconds']['total'] / 60:.1f} min"


def figure(found: dict[str, dict[str, Any]]) -> Figure:
    """The error of every block, calibration and held-out, for each mask at 50 %."""
    drawing = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, mask in zip(drawing.subplots(1, len(MASKS), sharey=True), MASKS, strict=True):
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
