"""What is said to a user whose input cannot work."""


class BadInput(ValueError):
    """Input that cannot work, in one plain sentence: the key, its value, and what would do.

    The command line prints the sentence alone and exits with status 2.
    """
