"""report.html: a recorded run as one page that loads nothing.

The data stand in it once, as JSON (`reading.read` gives them back); the page's own script draws
from them the prediction that is asked for. Without scripts the tables and the last round are there.
"""

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from tracefl.errors import as_sentence
from tracefl.files import write_atomically
from tracefl.report import charts, static, view, words
from tracefl.report.commands import trace_command
from tracefl.report.content import Gathered
from tracefl.report.pictures import Inputs
from tracefl.report.predictions import DEPTHS, Depth, Prediction, predictions, rest_csv

MOST_BYTES = 980_000  # of a page
LEAST_BYTES = 7  # of a contribution
CSV_BYTES = 100_000  # of what it has no room for
WITHOUT_SCRIPT = 90_000  # bytes of the last round without scripts, at most
SHARE_OF_NUMBERS = 0.85  # of the room; the rest is for pictures
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page: one file that needs no other, no network and no script to be read.

    Args:
        run_folder: of a recorded run.
        out: the file to write; default: report.html in the run's folder.

    Returns:
        The file.

    Raises:
        TraceFLError: there is no run, one of its files cannot be read, or the page not written.
    """
    folder = Path(run_folder)
    file = folder / "report.html" if out is None else Path(out)
    wrong = (KeyError, IndexError, TypeError, ValueError, AttributeError, UndefinedError)
    with as_sentence(f"a result in {folder} is not as TraceFL writes it", "run the same command again", *wrong):
        page = render(Gathered(folder))
    with as_sentence(f"{file} cannot be written", "name another file", OSError):
        write_atomically(file, page)
    return file


def render(run: Gathered) -> bytes:
    """The page, told in as much depth as it has room for."""
    inputs, found, pictures = Inputs(run.run, run.backdoor), list[Prediction](), dict[str, dict[str, str]]()
    again = {"trace": trace_command(str(run.content["folder"])), "methods": _repeated(run)}
    words_of = {
        "meaning": words.MEANING, "sure": words.SURE, "log_odds": words.LOG_ODDS, "no_difference": words.NO_DIFFERENCE
    }  # fmt: skip
    content = {**run.content, "again": again, "words": words_of, "missing": inputs.missing, "left_out": 0, "listed": 0}
    for depth in DEPTHS:
        if depth is not DEPTHS[-1] and _numbers(run, depth) * LEAST_BYTES > MOST_BYTES / 2:
            continue
        found = _predictions(run, depth)
        rows = sorted({one["i"] for one in found})
        pictures = {str(row): told for row, told in inputs.show(rows, depth.colours, depth.letters).items()}
        page = _page({**content, "predictions": found, "inputs": pictures})
        if len(page) <= MOST_BYTES:
            return page
    return _fitted(run, content, found, pictures)


def _numbers(run: Gathered, depth: Depth) -> int:
    """How many contributions are told at least, at a depth."""
    if run.answers is None:
        return 0
    inputs = run.answers.groupby(["round", "method"])["input"].nunique().sum()
    return int(min(len(run.answers), inputs * depth.clients))


def _repeated(run: Gathered) -> list[str]:
    """The methods that `tracefl trace` has with the settings of this run."""
    known = bool(run.settings) and not run.backdoor
    return ["influence", "shapley"] if known else []


def _predictions(run: Gathered, depth: Depth) -> list[Prediction]:
    if run.answers is None:
        return []
    return predictions(run.answers, run.layers, run.clients, run.layer_names, depth)


def _fitted(
    run: Gathered, content: dict[str, Any], found: list[Prediction], pictures: dict[str, dict[str, str]]
) -> bytes:
    """The page with what fits: the last rounds first, then pictures; the rest as a table."""
    found = sorted(found, key=lambda one: -one["r"])
    room = MOST_BYTES - WITHOUT_SCRIPT - len(_page({**content, "predictions": found[:1], "inputs": {}}))
    kept, used = list[Prediction](), 0
    for one in found:
        used += len(_json(one).encode()) + 1
        if used > room * SHARE_OF_NUMBERS:
            break
        kept.append(one)
    lines = rest_csv(found[len(kept) :], run.clients, run.class_names)
    while len(table := "\r\n".join(lines).encode()) > CSV_BYTES:
        lines = lines[: len(lines) * CSV_BYTES // len(table)]
    listed = len(lines) - 1
    room -= used + len(table) * 4 // 3
    shown, rows = dict[str, dict[str, str]](), {str(one["i"]) for one in kept}
    for row, told in pictures.items():
        room -= (len(_json(told).encode()) + 10) if row in rows else 0
        if row in rows and room > 0:
            shown[row] = told
    content |= {"left_out": len(found) - len(kept), "listed": listed}
    return _page({**content, "predictions": kept, "inputs": shown}, base64.b64encode(table).decode())


def _page(content: dict[str, Any], csv: str = "") -> bytes:
    parts = {"css": _own("page.css"), "js": _own("page.js")}
    hashes = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    html = _template().render(
        content=content, run=content["run"], verdict=view.verdict_view(content), facts=view.facts(content),
        rounds=view.rounds_view(content), holdings=view.holdings(content), values=view.values_by_class(content),
        whole=view.whole_view(content), static=static.static_predictions(content), data=_json(content), csv=csv,
        hashes=hashes, **parts,
    )  # fmt: skip
    return words.UNSEEN.sub("\ufffd", html).encode()


@cache
def _template() -> Any:
    loader = PackageLoader("tracefl.report", ".")
    around = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    around.filters |= {"show": words.show, "number": words.number, "fixed": words.fixed, "percent": words.percent}
    around.globals |= {"bar": charts.bar, "head_letters": view.HEAD_LETTERS, "rule": view.RULE}
    return around.get_template("page.html.j2")


@cache
def _own(name: str) -> str:
    """One of the page's own files."""
    return files("tracefl.report").joinpath(name).read_text("utf-8").replace("\r\n", "\n")


def _json(value: Any) -> str:
    """Strict JSON that may stand in a page: nothing in it ends the script or starts a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda found: ESCAPED[found.group()], text)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found.group()):04x}", text)
