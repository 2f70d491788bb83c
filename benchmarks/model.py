"""Seconds to prune the whole of the quickstart's model by several methods, in turn, in one run.

The model, the tokens and the work are those of `benchmarks/methods.py`: block after block, with the two forward passes
through every block that sequential pruning needs; nothing is reconstructed.

    python benchmarks/model.py [--methods Wanda SparseGPT ADMM] [--sparsity 0.5] [--repeat 3]
"""

import argparse
from statistics import median

from layers import rate
from methods import METHODS, measure


def main() -> None:
    """Measure and print a table in Markdown: the median, least and most seconds, and how many times the first's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["Wanda", "SparseGPT", "ADMM"], choices=METHODS)
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    taken: dict[str, list[float]] = {method: [] for method in arguments.methods}
    rates = []
    for draw in range(arguments.repeat):
        for method, seconds in taken.items():
            rates.append(rate())
            seconds.append(measure(method, arguments.sparsity, draw, evaluate=False)["seconds"])
    first = taken[arguments.methods[0]]
    print(f"Sparsity {arguments.sparsity}; a large matrix product runs at {median(rates) / 1e9:.0f} GFLOP/s.\n")
    print(f"| method | median seconds | least - most | times {arguments.methods[0]} |\n|---|---|---|---|")
    for method, seconds in taken.items():
        times = median(ours / theirs for ours, theirs in zip(seconds, first, strict=True))
        print(f"| {method} | {median(seconds):.1f} | {min(seconds):.1f} - {max(seconds):.1f} | {times:.2f} |")


if __name__ == "__main__":
    main()
