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

from jinja2 import Environment, PackageLoader, StrictUndefined

from tracefl.errors import as_sentence
from tracefl.report import charts, static, view, words
from tracefl.report.commands import trace_command
from tracefl.report.content import Gathered
from tracefl.report.pictures import Inputs
from tracefl.report.predictions import DEPTHS, Depth, Prediction, predictions, rest_csv
from tracefl.runs import write_atomically

MOST_BYTES = 980_000  # of a page
CSV_BYTES = 60_000  # of what it has no room for
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
    page = render(Gathered(folder))
    with as_sentence(f"{file} cannot be written", "name another file", OSError):
        write_atomically(file, page)
    return file


def render(run: Gathered) -> bytes:
    """The page, told in as much depth as it has room for."""
    trigger = run.backdoor
    inputs, all_found = Inputs(run.run, trigger), list[Prediction]()
    again = {"trace": trace_command(str(run.content["folder"])), "methods": _repeated(run)}
    content = {**run.content, "again": again, "missing": inputs.missing, "predictions": [], "inputs": {}, "left_out": 0}
    for depth in DEPTHS:
        all_found = _predictions(run, depth)
        page = _page({**content, "predictions": all_found, "inputs": _inputs(inputs, all_found, depth)})
        if len(page) <= MOST_BYTES:
            return page
    return _fitted(run, content, all_found, inputs)


def _repeated(run: Gathered) -> list[str]:
    """The methods that `tracefl trace` has with the settings of this run."""
    known = bool(run.settings) and not run.backdoor
    return ["influence", "shapley"] if known else []


def _predictions(run: Gathered, depth: Depth) -> list[Prediction]:
    if run.answers is None:
        return []
    return predictions(run.answers, run.layers, run.clients, run.layer_names, depth)


def _inputs(inputs: Inputs, found: list[Prediction], depth: Depth) -> dict[str, dict[str, str]]:
    rows = sorted({one["i"] for one in found})
    return {str(row): told for row, told in inputs.show(rows, depth.colours, depth.letters).items()}


def _fitted(run: Gathered, content: dict[str, Any], found: list[Prediction], inputs: Inputs) -> bytes:
    """The page with what fits: the last rounds first, then pictures; the rest as a table."""
    found = sorted(found, key=lambda one: -one["r"])
    room = MOST_BYTES - len(_page({**content, "predictions": found[:1]})) - 100_000  # what has no script
    kept, used = list[Prediction](), 0
    for one in found:
        used += len(_json(one)) + 1
        if used > room * 2 / 3:
            break
        kept.append(one)
    left_out = found[len(kept) :]
    room -= used + (CSV_BYTES * 2 if left_out else 0)
    shown = dict[str, dict[str, str]]()
    for row, told in _inputs(inputs, kept, DEPTHS[-1]).items():
        room -= len(_json(told)) + 10
        if room < 0:
            break
        shown[row] = told
    table = rest_csv(left_out, run.clients, run.class_names).encode()[:CSV_BYTES]
    link = base64.b64encode(table.rpartition(b"\n")[0]).decode() if left_out else ""
    return _page({**content, "predictions": kept, "inputs": shown, "left_out": len(left_out)}, link)


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
    around.globals |= {"bar": charts.bar, "head_letters": view.HEAD_LETTERS}
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
