"""How do the numbers look as a picture? Time against delta, drawn as SVG for light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from benchmarks.bench import Case, Results
from benchmarks.contenders import LIMIT_SHA1, LIMIT_XXH128, RSYNC_DELTA, RSYNC_WHOLE, SHA1, XXH128
from benchmarks.groups import PERCENTAGES
from benchmarks.verdicts import get_limit_seconds

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 560, 64, 384
"""The frame of the plot. What's right of it belongs to the names of the lines."""
LABEL_HEIGHT = 17
AXIS = "seconds, medians of whole runs (each horizontal line is twice the one below)"

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 }
.title { font-size: 16px; font-weight: 600 }
.axis, .value { font-size: 12px; fill: #666 }
.grid { stroke: #ddd; stroke-width: 1 }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.limit { stroke-width: 1.5; stroke-dasharray: 5 4 }
.background { fill: #fff }
.c0 { stroke: #b3501d } .c1 { stroke: #c9952b } .c2 { stroke: #1f63b5 } .c3 { stroke: #12876f }
.f0 { fill: #b3501d } .f1 { fill: #c9952b } .f2 { fill: #1f63b5 } .f3 { fill: #12876f }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .axis, .value { fill: #aaa } .grid { stroke: #383d44 } .background { fill: #15181c }
  .c0 { stroke: #f0884f } .c1 { stroke: #e7c062 } .c2 { stroke: #6cacf5 } .c3 { stroke: #4cc9ab }
  .f0 { fill: #f0884f } .f1 { fill: #e7c062 } .f2 { fill: #6cacf5 } .f3 { fill: #4cc9ab }
}
"""


@dataclass(frozen=True)
class Line:
    """A line of the picture: seconds for each of :data:`.PERCENTAGES`."""

    name: str
    color: int
    seconds: Sequence[float]
    dashed: bool = False


def draw_results(results: Results, size: int) -> str:
    """
    Draw the group ``delta``.

    :returns: An SVG document, empty when not everything was measured that belongs into it.
    """
    case = Case("delta", RSYNC_DELTA, size)
    lines = []
    for name, color, contender in (
        ("rsync, delta", 0, RSYNC_DELTA),
        ("rsync -W", 1, RSYNC_WHOLE),
        ("pdiffcopy, sha1", 2, SHA1),
        ("pdiffcopy, xxh128", 3, XXH128),
        ("limit of sha1", 2, LIMIT_SHA1),
        ("limit of xxh128", 3, LIMIT_XXH128),
    ):
        is_limit = contender.hash is not None
        cases = [Case("delta", contender, size, percent=percent) for percent in PERCENTAGES]
        seconds = [get_limit_seconds(results, case) if is_limit else results.median(case) for case in cases]
        present = [value for value in seconds if value is not None]
        if len(present) == len(seconds):
            lines.append(Line(name, color, present, dashed=is_limit))
    title = f"Bringing a file of {case.size / 1024**3:.2g} GiB into line, on loopback"
    return draw(title, lines) if lines else ""


def draw(title: str, lines: Sequence[Line]) -> str:
    """Draw lines on a logarithmic scale of seconds."""
    values = [value for line in lines for value in line.seconds]
    lowest, highest = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    highest = max(highest, lowest + 1)

    def get_x(index: int) -> float:
        return LEFT + (RIGHT - LEFT) * index / (len(PERCENTAGES) - 1)

    def get_y(seconds: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log2(seconds) - lowest) / (highest - lowest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(_describe(lines))}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="background" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        f'<text class="axis" x="{LEFT}" y="47">{AXIS}</text>',
    ]
    for power in range(lowest, highest + 1):
        y = get_y(2.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}</text>')
    for index, percent in enumerate(PERCENTAGES):
        x = get_x(index)
        parts.append(f'<text class="axis" x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{percent} %</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{BOTTOM + 42}" text-anchor="middle">'
                 "share of the blocks that differ, scattered over the file</text>")  # fmt: skip
    for line in lines:
        points = " ".join(f"{get_x(index):.1f},{get_y(value):.1f}" for index, value in enumerate(line.seconds))
        kind = f"line c{line.color}" + (" limit" if line.dashed else "")
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
        if not line.dashed:
            parts += [f'<circle class="f{line.color}" cx="{get_x(index):.1f}" cy="{get_y(value):.1f}" r="3.5"/>'
                      for index, value in enumerate(line.seconds)]  # fmt: skip
    positions = spread([get_y(line.seconds[-1]) for line in lines])
    for line, y in zip(lines, positions, strict=True):
        value = f'<tspan class="value" dx="6">{line.seconds[-1]:.2f} s</tspan>'
        parts.append(f'<text class="f{line.color}" x="{RIGHT + 12}" y="{y + 4:.1f}">{escape(line.name)}{value}</text>')
    return "\n".join([*parts, "</svg>", ""])


def spread(positions: Sequence[float]) -> list[float]:
    """Move labels apart that would cover each other, as little as a simple way can, and keep them in the frame."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for before, index in pairwise(order):
        placed[index] = max(placed[index], placed[before] + LABEL_HEIGHT)
    excess = max(0.0, placed[order[-1]] - BOTTOM) if order else 0.0
    floor = math.inf
    for index in reversed(order):
        placed[index] = min(placed[index], BOTTOM, floor) if excess else placed[index]
        floor = placed[index] - LABEL_HEIGHT
    return placed


def _describe(lines: Sequence[Line]) -> str:
    """The same in words, for those who can't see the picture."""
    shares = ", ".join(f"{percent} %" for percent in PERCENTAGES)
    return f"Time for {shares}. " + " ".join(
        f"{line.name}: {', '.join(f'{s:.2f} s' for s in line.seconds)}." for line in lines
    )
