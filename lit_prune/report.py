"""The verb `report`: finished runs side by side, as a page, as tables for papers and as plots.

Whatever is slow to import is imported when it is needed, so that `--help` is quick.
"""

import tempfile
from argparse import ArgumentError
from collections import Counter
from pathlib import Path

from jsonargparse import ArgumentParser

from lit_prune.atomic import built_whole
from lit_prune.cli import VERBS
from lit_prune.complaints import sentence
from lit_prune.errors import BadInput
from lit_prune.finished import FinishedRun

RUNS, OUTPUT = "runs", "output"


def report(runs: list[str], output: str) -> None:
    """Compare finished runs in a new folder.

    Args:
        runs: the runs' folders.
        output: the folder to write; it must not exist, or be empty.

    Raises:
        BadInput: a run is missing, not finished or named twice, or the folder holds something.
    """
    folder = Path(output).expanduser()
    _require_free(folder)
    finished = [FinishedRun.open(Path(run).expanduser(), RUNS).with_evaluation(RUNS) for run in runs]
    path, count = Counter(run.path.resolve() for run in finished).most_common(1)[0]
    if count > 1:
        raise BadInput(f"{RUNS}: '{path}' is given {count} times; give every run once.")

    from lit_prune.reporting.compared import name_runs
    from lit_prune.reporting.comparison_report import write_comparison

    with built_whole(folder) as draft:
        draft.mkdir()
        write_comparison(name_runs(finished), draft)
    print(f"report  {folder / 'report.html'}\ntables  {folder / 'tables.md'}, tables.tex, *.csv")
    print(f"plots   {folder / 'plots'}")


def main(arguments: list[str]) -> None:
    """Parse and run `lit-prune report ...`.

    Raises:
        BadInput: a setting is unknown, missing or cannot work.
    """
    parser = ArgumentParser(
        prog="lit-prune report", description=VERBS["report"].summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(RUNS, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument(f"--{OUTPUT}", type=str, required=True, help="the folder to write; new, or empty")
    try:
        settings = parser.parse_args(arguments[1:])
    except ArgumentError as error:
        raise BadInput(sentence(str(error), parser.get_defaults().keys(), {}, "report")) from error
    report(settings[RUNS], settings[OUTPUT])


def _require_free(folder: Path) -> None:
    """Nothing is ever written over, and what cannot be written is found before long work."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise BadInput(f"{OUTPUT}: '{existing}' is a file; give a new folder.")
    if existing == folder and any(folder.iterdir()):
        raise BadInput(f"{OUTPUT}: '{folder}' is not empty; give a new folder.")
    if folder.resolve() == Path.cwd():  # the comparison takes the place of an empty folder
        raise BadInput(f"{OUTPUT}: '{folder}' is where the command was given; give a new folder.")
    try:
        Path(tempfile.mkdtemp(dir=existing)).rmdir()
    except OSError as error:
        raise BadInput(f"{OUTPUT}: '{folder}' cannot be written ({error.strerror}); give another folder.") from error
