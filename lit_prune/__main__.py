"""`python -m lit_prune` is the command `lit-prune`."""

from lit_prune.cli import main

main()
