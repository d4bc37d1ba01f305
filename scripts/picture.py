"""
Hold the code against the picture of the house (CONTRIBUTING.rst): floors, wings, and how large a room may be.

What docs/design.rst draws of it has all rooms.

A module may import from its own wing and from the floors below, whatever the import looks like (at the top, inside a
function, for the type checker only), and never in a circle.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pdiffcopy"
DESIGN = Path(__file__).parents[1] / "docs" / "design.rst"

FLOORS: list[dict[str, str]] = [
    {"ground": r"|cores|exceptions|address|blocks|entries|digests|methods|security|pace"},
    {
        "wire": r"words|extents|features|request|protocol|bundles|wholes|answers|streams",
        "files": r"files(\..*)?",
        "processes": r"processes|mp",
    },
    {"hashing": r"hashing"},
    {"replica": r"replica|localreplica"},
    {"client": r"client(\..*)?", "server": r"server(\..*)?", "operations": r"operations"},
    {"program": r"options|console|spool|cli|__main__"},
]
"""From the ground up: the wings of each floor, and which modules they have (the empty name is the package itself)."""

MAX_MODULE = 350
"""How many lines a module may have."""
MAX_FUNCTION, MEDIAN_FUNCTION = 40, 8
"""How many lines a function may have, and how many half of them may."""


def read_modules() -> dict[str, ast.Module]:
    """Parse all modules. Their names don't have that of the package."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts).removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text("utf-8"))
    return modules


def find_imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Find the modules of the package that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            # What follows may be a module, or something in one.
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {member for member in members if member.partition(".")[2] in names}
            found |= modules if len(modules) == len(members) else modules | {node.module or ""}
    ours = {name for name in found if name == "pdiffcopy" or name.startswith("pdiffcopy.")}
    return {name.partition(".")[2] for name in ours}


def locate(name: str) -> tuple[int, str]:
    """Find the floor and the wing of a module."""
    for floor, wings in enumerate(FLOORS):
        for wing, pattern in wings.items():
            if re.fullmatch(pattern, name):
                return floor, wing
    raise KeyError(f"{name} has no place in the picture")


def check_arrows(imports: dict[str, set[str]]) -> Iterator[str]:
    """Yield a complaint for each import that leads up or sideways, and for a circle."""
    for name, others in imports.items():
        floor, wing = locate(name)
        for other in sorted(others):
            there, other_wing = locate(other)
            if there > floor or (there == floor and other_wing != wing):
                yield f"{name or 'the package'} ({wing}) imports {other} ({other_wing})"
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as e:
        yield f"a circle: {' -> '.join(name or 'the package' for name in e.args[1])}"


def check_sizes(modules: dict[str, ast.Module]) -> Iterator[str]:
    """Yield a complaint for each module and each function that is too long."""
    sizes = []
    for name, tree in modules.items():
        lines = max((node.end_lineno or 0 for node in tree.body), default=0)
        if lines > MAX_MODULE:
            yield f"{name} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                sizes.append((node.end_lineno or 0) - node.lineno + 1)
                if sizes[-1] > MAX_FUNCTION:
                    yield f"{name}: {node.name} has {sizes[-1]} lines"
    if statistics.median(sizes) > MEDIAN_FUNCTION:
        yield f"half of the functions have more than {MEDIAN_FUNCTION} lines"


def check_house(names: Iterable[str]) -> Iterator[str]:
    """Yield a complaint for each module that the house in docs/design.rst lacks."""
    _, _, text = DESIGN.read_text("utf-8").partition("\nThe house\n")
    house = set(re.findall(r"\w+", text.partition("\n::\n")[2].partition("\nThe client and")[0]))
    for name in names:
        if (room := name.rpartition(".")[2]) not in house | {"", "__main__"}:
            yield f"{room} isn't in the house of {DESIGN.name}"


def main() -> None:
    """Print what doesn't fit, and fail if there is anything."""
    modules = read_modules()
    imports = {name: find_imports(tree, set(modules)) for name, tree in modules.items()}
    complaints = [*check_arrows(imports), *check_sizes(modules), *check_house(modules)]
    for complaint in complaints:
        print(complaint)
    arrows = sum(map(len, imports.values()))
    print(f"{len(modules)} modules, {arrows} imports, {len(complaints)} of them or of the sizes out of place")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
