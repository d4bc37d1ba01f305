"""Print the lowest versions that requirements files admit, for pip's option --constraint."""

import re
import sys
from pathlib import Path


def read_bounds(filename: str) -> dict[str, str]:
    """The requirements of a file that have a lower bound: their names and these bounds."""
    lines = Path(filename).read_text(encoding="utf-8").splitlines()
    return dict(match.groups() for line in lines if (match := re.match(r"([\w-]+)(?:\[\w+\])? *>= *([\d.]+)", line)))


if __name__ == "__main__":
    bounds: dict[str, str] = {}
    for name in sys.argv[1:]:
        bounds |= read_bounds(name)
    for package, version in sorted(bounds.items()):
        print(f"{package} == {version}")
