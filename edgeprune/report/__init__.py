"""The report: one record shown as a page, as terminal text and beside others. Its JSON is :func:`edgeprune.records.files.to_json`."""

from edgeprune.report.html import render_html
from edgeprune.report.terminal import compare_text, render_terminal

__all__ = ["compare_text", "render_html", "render_terminal"]
