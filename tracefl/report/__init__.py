"""What a person sees and keeps: log lines, progress, tables, plots, the page."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracefl.report.page import write_page
    from tracefl.report.reading import Report, read

__all__ = ["Report", "read", "write_page"]
_HOMES = {"write_page": "page", "read": "reading", "Report": "reading"}


def __getattr__(name: str) -> Any:
    """Import pandas and torch only when they are needed."""
    if name in _HOMES:
        return getattr(import_module(f"tracefl.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tracefl.report' has no attribute '{name}'")
