"""What a run says about itself: TensorBoard while it goes on, then one HTML page and a small table."""

from typing import TYPE_CHECKING, Any

from lit_prune.reporting.report import summary_table, write_report

if TYPE_CHECKING:
    from lit_prune.reporting.board import Board

__all__ = ["Board", "summary_table", "write_report"]


def __getattr__(name: str) -> Any:
    """Import `Board` when it is asked for: it needs Lightning, which takes seconds; page and table do not."""
    if name == "Board":
        from lit_prune.reporting.board import Board

        return Board
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
