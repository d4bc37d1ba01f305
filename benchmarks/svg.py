"""How do the numbers look as a picture? Time against changes, drawn as SVG for light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise, product

from benchmarks.bench import LOOPBACK, Case, Results
from benchmarks.contenders import DEFAULT, RSYNC_DELTA, RSYNC_WHOLE
from benchmarks.files import PAGES, SCATTERED
from benchmarks.groups import CUBIC, PERCENTAGES

WIDTH, HEIGHT = 900, 640
LEFTS, TOPS = (56, 496), (96, 376)
"""Where the panels begin."""
PANEL_WIDTH, PANEL_HEIGHT = 250, 200
"""The frame of a plot. What's right of it belongs to the names of the lines."""
LABEL_HEIGHT = 17
AXIS = "seconds, medians of whole runs (each horizontal line is twice the one below)"

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 }
.title { font-size: 16px; font-weight: 600 }
.heading { font-weight: 600 }
.axis, .value { font-size: 12px; fill: #666 }
.grid { stroke: #ddd; stroke-width: 1 }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.background { fill: #fff }
.c0 { stroke: #b3501d } .c1 { stroke: #c9952b } .c2 { stroke: #1f63b5 }
.f0 { fill: #b3501d } .f1 { fill: #c9952b } .f2 { fill: #1f63b5 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .axis, .value { fill: #aaa } .grid { stroke: #383d44 } .background { fill: #15181c }
  .c0 { stroke: #f0884f } .c1 { stroke: #e7c062 } .c2 { stroke: #6cacf5 }
  .f0 { fill: #f0884f } .f1 { fill: #e7c062 } .f2 { fill: #6cacf5 }
}
"""


@dataclass(frozen=True)
class Line:
    """A line of a panel: seconds for each of :data:`.PERCENTAGES`."""

    name: str
    color: int
    seconds: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One of the plots."""

    title: str
    lines: Sequence[Line]


def draw_results(results: Results, size: int, congestion_control: str) -> str:
    """
    Draw the group ``delta``.

    :param congestion_control: That of the system.
    :returns: An SVG document, empty when not everything was measured that belongs into it.
    """
    panels = []
    for layout, what in ((SCATTERED, "changes of 1 MiB"), (PAGES, "changes of 4 KiB")):
        for link, control in ((LOOPBACK, congestion_control), (CUBIC, CUBIC)):
            lines = []
            for color, contender in enumerate((RSYNC_DELTA, RSYNC_WHOLE, DEFAULT)):
                case = Case("delta", contender, size, link=link)
                layouts = [layout if percent else SCATTERED for percent in PERCENTAGES]
                cases = [replace(case, layout=x, percent=y) for x, y in zip(layouts, PERCENTAGES, strict=True)]
                seconds = [value for value in map(results.median, cases) if value is not None]
                if len(seconds) == len(cases):
                    lines.append(Line(contender.name, color, seconds))
            if lines:
                panels.append(Panel(f"{what}, {control}", lines))
    title = f"Bringing a file of {size / 1024**3:.2g} GiB into line, on loopback"
    return draw(title, panels) if len(panels) == len(LEFTS) * len(TOPS) else ""


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels on a common logarithmic scale of seconds."""
    values = [value for panel in panels for line in panel.lines for value in line.seconds]
    lowest, highest = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(' '.join(map(_describe, panels)))}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="background" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="{LEFTS[0]}" y="28">{escape(title)}</text>',
        f'<text class="axis" x="{LEFTS[0]}" y="47">{AXIS}</text>',
        f'<text class="axis" x="{LEFTS[0]}" y="{HEIGHT - 12}">share of the MiBs of the file in which something has '
        "changed; the names of the panels tell the congestion control</text>",
    ]
    for panel, (top, left) in zip(panels, product(TOPS, LEFTS), strict=True):
        parts += _draw_panel(panel, left, top, lowest, max(highest, lowest + 1))
    return "\n".join([*parts, "</svg>", ""])


def _draw_panel(panel: Panel, left: int, top: int, lowest: int, highest: int) -> Iterator[str]:
    bottom, right = top + PANEL_HEIGHT, left + PANEL_WIDTH

    def get_x(index: int) -> float:
        return left + PANEL_WIDTH * index / (len(PERCENTAGES) - 1)

    def get_y(seconds: float) -> float:
        return bottom - PANEL_HEIGHT * (math.log2(seconds) - lowest) / (highest - lowest)

    yield f'<text class="heading" x="{left}" y="{top - 14}">{escape(panel.title)}</text>'
    for power in range(lowest, highest + 1):
        y = get_y(2.0**power)
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}</text>'
    for index, percent in enumerate(PERCENTAGES):
        x = get_x(index)
        yield f'<text class="axis" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{percent} %</text>'
    for line in panel.lines:
        points = " ".join(f"{get_x(index):.1f},{get_y(value):.1f}" for index, value in enumerate(line.seconds))
        yield f'<polyline class="line c{line.color}" points="{points}"/>'
        for index, value in enumerate(line.seconds):
            yield f'<circle class="f{line.color}" cx="{get_x(index):.1f}" cy="{get_y(value):.1f}" r="3.5"/>'
    positions = spread([get_y(line.seconds[-1]) for line in panel.lines], bottom)
    for line, y in zip(panel.lines, positions, strict=True):
        value = f'<tspan class="value" dx="6">{line.seconds[-1]:.2f} s</tspan>'
        yield f'<text class="f{line.color}" x="{right + 12}" y="{y + 4:.1f}">{escape(line.name)}{value}</text>'


def spread(positions: Sequence[float], bottom: float) -> list[float]:
    """Move labels apart that would cover each other, as little as a simple way can, and keep them in the frame."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for before, index in pairwise(order):
        placed[index] = max(placed[index], placed[before] + LABEL_HEIGHT)
    excess = max(0.0, placed[order[-1]] - bottom) if order else 0.0
    floor = math.inf
    for index in reversed(order):
        placed[index] = min(placed[index], bottom, floor) if excess else placed[index]
        floor = placed[index] - LABEL_HEIGHT
    return placed


def _describe(panel: Panel) -> str:
    """The same in words, for those who can't see the picture."""
    shares = ", ".join(f"{percent} %" for percent in PERCENTAGES)
    return f"{panel.title}, time for {shares}. " + " ".join(
        f"{line.name}: {', '.join(f'{s:.2f} s' for s in line.seconds)}." for line in panel.lines
    )
