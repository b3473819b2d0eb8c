"""Results -> a page, a Markdown file, a CSV and figures."""

from ablations.report.build import write_report

__all__ = ["write_report"]
