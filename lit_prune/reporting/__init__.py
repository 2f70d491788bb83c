"""What a run says about itself: TensorBoard (`board`) while it goes on, then one HTML page and a small table."""

from lit_prune.reporting.headline import conventions
from lit_prune.reporting.report import evaluation_table, summary_table, write_report

__all__ = ["conventions", "evaluation_table", "summary_table", "write_report"]
