"""The command `lit-prune`: a table from verb to function, each imported when it is called."""

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, NoReturn

from lit_prune import __version__
from lit_prune.complaints import nearest, out_of
from lit_prune.errors import BadInput


class Verb(NamedTuple):
    """Where a verb's function lives, and what it does in a line."""

    module: str
    summary: str


VERBS = {
    "fit": Verb("lit_prune.fit", "prune a model, reconstruct it block by block, save and measure it"),
    "evaluate": Verb("lit_prune.evaluate", "measure a model or run: perplexity, divergence from the dense one, tasks"),
    "export": Verb("lit_prune.export.verb", "write a result in another format, push it to a hub, or measure its speed"),
    "generate": Verb("lit_prune.generate", "let the dense model write its own calibration text"),
    "report": Verb("lit_prune.report", "compare finished runs: a page, tables for papers, plots"),
}

USAGE = f"""usage: lit-prune [--help] [--version] VERB ...

Prune large language models after training and win the lost quality back by reconstruction.

verbs:
{"".join(f"  {name:<10} {verb.summary}{chr(10)}" for name, verb in VERBS.items())}
`lit-prune VERB --help` lists a verb's settings.
First look, in under a minute: lit-prune fit --config configs/tiny.yaml
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0 if all went well, 2 with one sentence if the input cannot work."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        print(USAGE, end="")
        sys.exit(0)
    if first == "--version":
        print(f"lit-prune {__version__}")
        sys.exit(0)
    if first == "--print_completion":
        first = "fit"  # whose parser knows all verbs
    if first not in VERBS:
        complain(f"There is no verb '{first}'{nearest(first, VERBS) or '; the verbs are: ' + ', '.join(VERBS) + '.'}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's request to end is one like Ctrl+C
    try:
        verb: Callable[[list[str]], None] = import_module(VERBS[first].module).main
        verb(arguments)
    except BadInput as error:
        complain(str(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning answers an interrupt in the middle of a training with an exit of its own
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        complain("Interrupted; the same command goes on after what is finished.", 130)
    except Exception as error:
        if shortage := out_of(error, first):
            complain(f"{shortage}.", 1)
        raise
    sys.exit(0)


def complain(sentence: str, status: int = 2) -> NoReturn:
    """Say one sentence on standard error and exit."""
    say(sentence)
    sys.exit(status)


def say(sentence: str) -> None:
    """Say one sentence on standard error."""
    print(f"lit-prune: {sentence}", file=sys.stderr, flush=True)
