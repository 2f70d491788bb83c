"""Prune large language models after training and win the lost quality back by reconstruction."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_prune.export.loading import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first asked for: torch and transformers take seconds."""
    if name == "load":
        from lit_prune.export.loading import load

        return load
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
