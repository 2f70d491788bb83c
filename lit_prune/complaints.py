"""What jsonargparse finds wrong with the settings, in one plain sentence."""

import difflib
import re
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean '...'?`, as far as something known resembles the word."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def sentence(message: str, keys: Iterable[str], classes: Iterable[str]) -> str:
    """Say a parser's error message in one sentence.

    Args:
        message: of several lines, with Python's types in it.
        keys: all settings there are, to suggest one where an unknown one was given.
        classes: names of classes to suggest where an unknown one was given.
    """
    message = message.replace("fit.", "")
    if missing := re.search(r"arguments are required: (.*)", message):
        return (
            f"These settings are missing: {missing[1]}; give them, "
            "or take a look first with: lit-prune fit --config configs/tiny.yaml"
        )
    if unknown := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
        key = unknown[1]
        return f"There is no setting '{key}'{nearest(key, keys) or '; see lit-prune fit --help.'}"
    key = (re.search(r'Parser key "([\w.]+)"', message) or ["", "settings"])[1]
    if own := re.search(r"Not of type \w+: (.*)", message):
        return f"{key}: {own[1]}."
    if path := re.search(r"Expected a dot import path string: (\S+)", message):
        wanted = _expected(message)
        either = f" It may also be {wanted}." if wanted else ""
        return f"{key}: there is no class '{path[1]}'{nearest(path[1], classes) or '; give its full path.'}{either}"
    if value := re.search(r"Given value: (.*)", message):
        return f"{key}: '{value[1]}' does not fit; give {_expected(message)}."
    reason = re.sub(rf'(Parser )?[Kk]ey "{re.escape(key)}":?', "", message)
    return f"{key}: {' '.join(reason.split())}"


def _expected(message: str) -> str:
    """The values that would do: `int or null`."""
    kinds = re.findall(r"Expected an? (?!dot import)(.*)", message)
    plain = [re.sub(r"typing\.Literal|<class '|'>|typing\.", "", kind).replace("NoneType", "null") for kind in kinds]
    return " or ".join(dict.fromkeys(plain))
