"""The command `lit-prune` from a checkout that is not installed: `python cli.py fit ...`."""

from lit_prune.cli import main

if __name__ == "__main__":
    main()
