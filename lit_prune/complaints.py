"""What jsonargparse finds wrong with the settings, in one plain sentence."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module

FIRST_STEPS = {"fit": "give them, or take a look first with: lit-prune fit --config configs/tiny.yaml"}
"""What a verb given nothing at all suggests."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean '...'?`, as far as something known resembles the word."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def sentence(message: str, keys: Iterable[str], classes: Mapping[str, Sequence[str]], verb: str = "fit") -> str:
    """Say a parser's error message in one sentence.

    Args:
        message: of several lines, with Python's types in it.
        keys: all settings there are, to suggest one where an unknown one was given.
        classes: by key, the names of the classes that it may be.
        verb: of the command.
    """
    message = message.replace(f"{verb}.", "")
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"These settings are missing: {missing[1]}; {FIRST_STEPS.get(verb, f'see lit-prune {verb} --help.')}"
    if unknown := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        key = unknown[1]
        return f"There is no setting '{key}'{nearest(key, keys) or f'; see lit-prune {verb} --help.'}"
    key = (re.search(r'Parser key "([\w.]+)"', message) or ["", "settings"])[1]
    if own := re.search(r"Not of type \w+: (.*)", message):
        return f"{key}: {own[1]}."
    if setting := re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not", message):
        return _no_such_setting(key, setting[1], setting[2])
    if setting := re.search(r"class_path '[\w.]+':\s+Parser key \"(\w+)\":(.*)Got value: (\S*)", message, re.DOTALL):
        return f"{key}.{setting[1]}: '{setting[3]}' does not fit; give {_expected(setting[2])}."
    if setting := re.search(r"NestedArg\(key='(\w+)', val=", message):
        return f"{key}: give its class before its settings, as in --{key} {classes[key][0]} --{key}.{setting[1]} ..."
    if path := re.search(r"Expected a dot import path string: (\S+)", message):
        known = classes.get(key, ())
        wanted = " or ".join([*known, *([_expected(message)] if _expected(message) else [])])
        alternatives = f"; give {wanted}." if wanted else "; give its full path."
        return f"{key}: there is no class '{path[1]}'{nearest(path[1], known) or alternatives}"
    if value := re.search(r"(?:Given|Got) value: (.*)", message):
        return f"{key}: '{value[1]}' does not fit; give {_expected(message)}."
    reason = re.sub(rf'(Parser )?[Kk]ey "{re.escape(key)}":?', "", message)
    return f"{key}: {' '.join(reason.split())}"


def out_of_range(error: ValueError, settings: Mapping[str, object]) -> str:
    """Say in one sentence which setting a class has refused.

    Args:
        error: what it raised, or what was raised from that; it begins with the setting's name in the class.
        settings: all settings by key.
    """
    cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    name = re.split(r"\W", str(cause), maxsplit=1)[0]
    reason = re.sub(r"^\w+:? ", "", str(cause))
    named = [key for key in settings if key.endswith(f".init_args.{name}")]
    meant = [key for key in named if str(settings[key]) in str(cause)] or named or ["model"]
    return f"{meant[0].removeprefix('fit.').replace('init_args.', '')}: {reason}."


def _no_such_setting(key: str, path: str, name: str) -> str:
    """A class has no such setting; say which it has."""
    module, _, short = path.rpartition(".")
    known = list(inspect.signature(getattr(import_module(module), short)).parameters)
    has = f"; it has {', '.join(known)}." if known else "; it has none."
    return f"{key}: {short} has no setting '{name}'{nearest(name, known) or has}"


def _expected(message: str) -> str:
    """The values that would do: `int or null`."""
    kinds = re.findall(r"Expected an? (?!dot import)(.*?)(?:\. (?:Got value.*)?)?$", message, re.MULTILINE)
    plain = [re.sub(r"<class '|'>|typing\.", "", kind).replace("NoneType", "null") for kind in kinds]
    choices = [
        re.sub(r"Literal\[(.*)\]", lambda c: c[1].replace("'", "").replace(", ", " or "), kind) for kind in plain
    ]
    return " or ".join(dict.fromkeys(choices))


OTHER_ENDED = "Another process of this run has ended; what is finished stays: the same command goes on"

LESS_MEMORY = {
    "fit": "the same command goes on with model.offload true and data.memory_share 0 as well; if that does not do, "
    "begin anew with a smaller model.window, data.batch_size or data.samples",
    "generate": "give a lower batch_size",
}
"""What a verb can do with less memory."""


def out_of(error: BaseException, verb: str) -> str:
    """What a machine has run out of, and what to do; nothing if an error is of another kind.

    Libraries say it in words of their own, so that these are all there is to go by.
    """
    text = f"{type(error).__name__} {error}"
    if re.search(r"MemoryError|can't allocate memory|not enough memory|Cannot allocate memory", text):
        return f"Out of memory; what is finished stays: {LESS_MEMORY.get(verb, 'free some')}"
    if re.search(r"gloo|DistBackendError|DistNetworkError|NCCL|Connection (closed|reset) by peer", text):
        return OTHER_ENDED
    if re.search(r"No space left on device|Disk quota exceeded|File too large|StorageFull|FileTooLarge", text):
        return "The disk is full; what is finished stays: free some, and the same command goes on"
    return ""
