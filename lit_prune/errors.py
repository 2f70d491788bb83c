"""What is said to a user whose input cannot work."""


class BadInput(ValueError):
    """Input that cannot work, in one plain sentence: the key, its value, and what would do.

    The command line prints the sentence alone and exits with status 2.
    """


def reason(error: Exception) -> str:
    """The first line of what an error says, and the second where the first only announces it; if nothing, its name."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    first, *others = [line.strip() for line in text.strip().splitlines()] or [type(error).__name__]
    return (f"{first} {others[0]}" if first.endswith(":") and others else first).rstrip(".,: ")
