"""What is said to a user whose input cannot work."""


class BadInput(ValueError):
    """Input that cannot work, in one plain sentence: the key, its value, and what would do.

    The command line prints the sentence alone and exits with status 2.
    """


def reason(error: Exception) -> str:
    """The first line of what an error says, without its full stop; what it is called where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")
