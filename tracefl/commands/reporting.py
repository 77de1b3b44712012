"""`tracefl report`: the pages of recorded runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tracefl.commands.show import Answer, printable
from tracefl.errors import as_sentence, require
from tracefl.report import write_page
from tracefl.report.progress import bar


def report(folders: Sequence[Path], out: Path | None) -> Answer:
    """Write the pages of runs.

    Args:
        folders: of the runs.
        out: the file of one run's page, or of several runs the folder for their pages; None: each
            in its run's folder.

    Raises:
        TraceFLError: a run cannot be read, or a page not be written.
    """
    pages = [out if out is None or len(folders) == 1 else out / f"{folder.resolve().name}.html" for folder in folders]
    twice = next((page.stem for page in pages if page is not None and pages.count(page) > 1), None)
    require(twice is None, f"two runs have the same name, {twice}: write their pages without --out, or one by one")
    folder_for_one = len(folders) == 1 and out is not None and out.is_dir()
    require(not folder_for_one, f"--out {out} is a folder: name the file of the page")
    written = []
    with bar("writing pages", len(folders)) as done:
        for folder, page in zip(folders, pages, strict=True):
            with as_sentence(f"the page of {folder} cannot be written", "name another file with --out", OSError):
                if page is not None:
                    page.parent.mkdir(parents=True, exist_ok=True)
                written.append({"run": str(folder), "page": str(write_page(folder, page))})
            done()
    return {"pages": written}


def lines(found: Answer) -> Iterator[str]:
    """The answer of `report` for people: a file a line."""
    yield from (printable(of["page"]) for of in found["pages"])
