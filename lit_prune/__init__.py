"""Prune large language models after training and win the lost quality back by reconstruction."""

__version__ = "0.1.0"
