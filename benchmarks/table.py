"""How do the numbers look as text?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.bench import DOWNLOAD, LOOPBACK, Case, Results
from benchmarks.contenders import LIMIT, RSYNC_DELTA, RSYNC_WHOLE
from benchmarks.growth import Line, Work
from benchmarks.verdicts import Verdict

MEBIBYTE, GIBIBYTE = 1024**2, 1024**3


def format_results(results: Results) -> str:
    """
    A table for each group: medians, and what they are divided by those of rsync and of the limit.

    What the work costs both hosts is told beside the time: CPU seconds for each GiB of the file, how often a thread was
    woken up or preempted, and memory.
    """
    groups: dict[str, list[Case]] = {}
    for case in results.samples:
        groups.setdefault(case.group, []).append(case)
    header = ["work", "MiB", "contender", "n", "median s", "min", "max", "CPU s/GiB client", "server",
              "wake-ups client", "server", "preempted client", "server", "MiB client", "server",
              "/ rsync delta", "/ rsync -W", "/ limit"]  # fmt: skip
    return "\n\n".join(
        f"{group}\n{format_table(header, [_format_case(results, case) for case in sorted(cases, key=_get_order)])}"
        for group, cases in groups.items()
    )


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """The table of promises, and the cases of those that have several."""
    rows = []
    for verdict in verdicts:
        measured = "-" if verdict.measured is None else f"{verdict.measured:.3f}"
        rows.append([verdict.work, verdict.against, f"{verdict.limit:.2f}", measured, verdict.text])
    lines = [format_table(["work", "against", "at most", "measured", "verdict"], rows), ""]
    for verdict in verdicts:
        if len(verdict.cases) > 1:
            lines.append(f"{verdict.work} (the worst one counts):")
            lines += [f"    {ratio:.3f}  {name}" for name, ratio in verdict.cases.items()]
    return "\n".join(lines)


def format_growth(lines: Sequence[Line], work: Sequence[Work]) -> str:
    """How time grows with the size of the file and of the delta, and how much work a GiB is."""
    parts = []
    if lines:
        rows = [[x.name, f"{x.start:.2f}", f"{x.slope:.2f}", f"{x.deviation:.0%}"] for x in lines]
        parts.append(format_table(["growth", "start s", "s/GiB", "deviation"], rows))
    if work:
        rows = [[x.name, f"{x.per_gib_compared:.0f}", f"{x.per_gib_moved:.0f}"] for x in work]
        parts.append(format_table(["work", "a GiB compared", "a GiB moved"], rows))
    return "\n\n".join(parts)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: numbers to the right, text to the left."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:]) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    formats = [f"{{:{'>' if right else '<'}{width}}}" for width, right in zip(widths, numeric, strict=True)]
    return "\n".join("  ".join(formats).format(*line).rstrip() for line in lines)


def _format_case(results: Results, case: Case) -> list[str]:
    samples = results.samples[case]
    walls = [sample.wall for sample in samples]
    row = [case.work, f"{case.size / MEBIBYTE:.0f}", case.contender.name, str(len(samples))]
    row += [f"{number:.3f}" for number in (results.median(case) or 0, min(walls), max(walls))]
    for name, unit, digits in (("cpu", case.size / GIBIBYTE, 2), ("wakeups", 1, 0), ("preemptions", 1, 0),
                               ("memory", MEBIBYTE, 0)):  # fmt: skip
        for side in ("client", "server"):
            number = results.median(case, lambda s, side=side, name=name: getattr(getattr(s, side), name)) or 0
            row.append(f"{number / unit:.{digits}f}")
    rivals = [replace(case, contender=rival) for rival in (RSYNC_DELTA, RSYNC_WHOLE)]
    limit = replace(case, contender=LIMIT, direction=DOWNLOAD, link=LOOPBACK)
    return [*row, *(_format_ratio(results, case, results.median(other)) for other in (*rivals, limit))]


def _format_ratio(results: Results, case: Case, divisor: float | None) -> str:
    median = results.median(case)
    return f"{median / divisor:.2f}" if median and divisor else ""


def _get_order(case: Case) -> tuple[object, ...]:
    return (case.link, case.direction, case.layout, case.percent, case.size)
