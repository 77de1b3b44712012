"""Charts as SVG, drawn by a few lines of our own: a picture with a title and a description.

Colours are classes of page.css, which knows light and dark; markers and dashes differ too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 76, 10, 26
MOST_MARKERS = 30
LABEL_HEIGHT = 13
Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart: y by round, NaN where there is none; `style` is a class of page.css."""

    name: str
    y: Sequence[float]
    style: str = "a"


def line_chart(x: Sequence[int], lines: Sequence[Line], title: str, *, percent: bool = False) -> Markup:
    """Lines over rounds, each named at its end.

    Args:
        x: numbers of the rounds, ascending.
        lines: with a y for every round.
        title: what is drawn; the description tells first and last values.
        percent: whether y are shares, drawn from 0 to 100 %.

    Example:
        >>> svg = line_chart([1, 2], [Line("loss", [2.0, 1.0])], "Loss")
        >>> "<title>Loss</title><desc>loss: 2 in round 1, 1 in round 2.</desc>" in svg
        True
    """
    found = [line for line in lines if any(map(math.isfinite, line.y))]
    if not (x and found):
        return Markup("")
    top = 1.0 if percent else _round_up(max(y for line in found for y in line.y if math.isfinite(y)))
    low = 0.0 if percent else min(0.0, min(y for line in found for y in line.y if math.isfinite(y)))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(t: float, y: float) -> tuple[float, float]:
        share = (t - x[0]) / max(x[-1] - x[0], 1)
        return LEFT + across * share, TOP + down * (1 - (y - low) / max(top - low, 1e-300))

    parts = [*_axes(x, low, top, at, percent)]
    ends = list[tuple[float, Line]]()
    for line in found:
        points = [at(t, y) for t, y in zip(x, line.y, strict=True) if math.isfinite(y)]
        parts.append(_path(points, line.style))
        ends.append((points[-1][1], line))
    parts += _names(ends)
    desc = " ".join(_described(line, x, percent) for line in found)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = Markup("<title>{}</title><desc>{}</desc>").format(title, desc)
    return Markup(f'<svg class="chart" role="img" {size}>') + head + Markup("").join(parts) + Markup("</svg>")


def bar(value: float, most: float) -> Markup:
    """A bar from the middle to the right, or to the left where the value is negative.

    It stands beside its number and is hidden from those who hear the page.

    Example:
        >>> print(bar(-1, 2))
        <svg class="bar" viewBox="-50 0 100 8" aria-hidden="true"><rect class="minus" x="-25" width="25" height="8"/></svg>
    """  # noqa: E501, W505
    length = 50 * min(abs(value) / most, 1) if most > 0 and math.isfinite(value) else 0
    start = -length if value < 0 else 0
    kind = "minus" if value < 0 else "plus"
    return Markup(
        '<svg class="bar" viewBox="-50 0 100 8" aria-hidden="true">'
        f'<rect class="{kind}" x="{start:.3g}" width="{length:.3g}" height="8"/></svg>'
    )


def _axes(x: Sequence[int], low: float, top: float, at: Place, percent: bool) -> list[Markup]:
    parts = []
    for step in range(3):
        y = low + (top - low) * step / 2
        _, down = at(x[0], y)
        name = f"{100 * y:.0f} %" if percent else f"{y:.3g}"
        parts.append(Markup(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'))
        parts.append(Markup(f'<text class="tick" x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{name}</text>'))
    for t in _some(x, 6):
        across, _ = at(t, low)
        parts.append(
            Markup(f'<text class="tick" x="{across:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(t)}</text>')
        )
    return parts


def _path(points: Sequence[tuple[float, float]], style: str) -> Markup:
    way = " ".join(f"{'L' if i else 'M'}{across:.1f} {down:.1f}" for i, (across, down) in enumerate(points))
    marks = points if len(points) <= MOST_MARKERS else points[-1:]
    dots = "" if style == "chance" else "".join(_mark(across, down, style) for across, down in marks)
    return Markup(f'<g class="{style}"><path class="line" d="{way}"/>{dots}</g>')


def _mark(across: float, down: float, style: str) -> str:
    if style == "b":
        return f'<rect class="mark" x="{across - 3:.1f}" y="{down - 3:.1f}" width="6" height="6"/>'
    if style == "c":
        return f'<path class="mark" d="M{across:.1f} {down - 4:.1f}l4 7h-8z"/>'
    return f'<circle class="mark" cx="{across:.1f}" cy="{down:.1f}" r="3"/>'


def _names(ends: Sequence[tuple[float, Line]]) -> list[Markup]:
    """The lines' names at their ends, moved apart where they would overlap."""
    ordered, places = sorted(ends, key=lambda end: end[0]), list[float]()
    for down, _ in ordered:
        places.append(max(down + 4, places[-1] + LABEL_HEIGHT) if places else down + 4)
    lowest = float(HEIGHT - BOTTOM + 6)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - LABEL_HEIGHT
    text = Markup('<text class="name {}" x="{}" y="{:.1f}">{}</text>')
    across = WIDTH - RIGHT + 8
    return [text.format(line.style, across, y, line.name) for y, (_, line) in zip(places, ordered, strict=True)]


def _described(line: Line, x: Sequence[int], percent: bool) -> str:
    known = [(t, y) for t, y in zip(x, line.y, strict=True) if math.isfinite(y)]
    told = [f"{100 * y:.1f} % in round {t}" if percent else f"{y:.3g} in round {t}" for t, y in known]
    return f"{line.name}: {', '.join(dict.fromkeys([told[0], told[-1]]))}."


def _some(x: Sequence[int], most: int) -> list[int]:
    """At most so many of the numbers, at even distances, the first and the last among them."""
    if len(x) <= most:
        return list(x)
    return [x[round(i * (len(x) - 1) / (most - 1))] for i in range(most)]


def _round_up(value: float) -> float:
    """The next number of the form 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= value * (1 - 1e-9))
