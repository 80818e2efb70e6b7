"""Each folder's table names its files, no folder is too full to scan, and no imports go round in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

PACKAGE = "distro_optim"
HOME = Path(__file__).parents[1] / "src" / PACKAGE
FOLDERS = sorted(file.parent for file in HOME.rglob("__init__.py"))
MAX_FILES = 20

RULER = re.compile(r"=+( +=+)+")
FIRST_COLUMN = re.compile(r"``\w+``(?:, ``\w+``)*")
NAME = re.compile(r"``(\w+)``")


def name_of(folder: Path) -> str:
    return ".".join([PACKAGE, *folder.relative_to(HOME).parts])


def files_of(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.py")} - {"__init__"}


def folders_of(folder: Path) -> set[str]:
    return {other.name for other in FOLDERS if other.parent == folder}


def described(init: Path) -> tuple[str, set[str]]:
    """The docstring of a package, and what it lists in ``__all__``."""
    tree = ast.parse(init.read_text(encoding="utf-8"))
    public = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    return ast.get_docstring(tree) or "", {name for names in public for name in names}


def names_in_tables(text: str) -> list[str]:
    """What stands in the first columns, in order."""
    names: list[str] = []
    inside = False
    for line in text.splitlines():
        if RULER.fullmatch(line):
            inside = not inside
        elif inside and (cell := FIRST_COLUMN.match(line)):
            names += NAME.findall(cell.group())
    return names


def test_the_first_columns_of_tables_are_read() -> None:
    text = (
        "Two tables.\n\n====  ===\n``a``  x\n``b``, ``c`` ``d``\n====  ===\n\n``e`` is prose.\n\n== ==\n``f`` y\n== =="
    )
    assert names_in_tables(text) == ["a", "b", "c", "f"]


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=name_of)
def test_the_table_of_a_folder_names_its_files(folder: Path) -> None:
    text, public = described(folder / "__init__.py")
    listed = names_in_tables(text)
    assert files_of(folder) - set(listed) == set(), "these files are missing from the table"
    assert set(listed) - files_of(folder) - folders_of(folder) - public == set(), "these are named and not there"
    assert len(listed) == len(set(listed)), "a file is named twice"
    assert folders_of(folder) - set(NAME.findall(text)) == set(), "these folders are not spoken of"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_fits_on_a_screen(folder: Path) -> None:
    assert len(files_of(folder)) <= MAX_FILES


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """All imports between modules of the package, those for type checking and inside functions included."""
    return grimp.build_graph(PACKAGE, cache_dir=None)


def a_circle(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """Names that lead back to the first of them along ``arrows``, or nothing."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for start, end in arrows:
        sorter.add(start, end)
    try:
        sorter.prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def arrows_of(imports: grimp.ImportGraph) -> list[tuple[str, str]]:
    return sorted((m, other) for m in imports.modules for other in imports.find_modules_directly_imported_by(m))


def test_a_circle_is_found() -> None:
    assert a_circle([("a", "b"), ("b", "c"), ("a", "c")]) == []
    assert a_circle([("a", "b"), ("b", "c"), ("c", "b")]) in (["b", "c", "b"], ["c", "b", "c"])


def test_no_modules_import_each_other_in_a_circle(imports: grimp.ImportGraph) -> None:
    assert len(imports.modules) > 250
    assert a_circle(arrows_of(imports)) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_no_neighbours_in_a_folder_import_each_other_in_a_circle(folder: Path, imports: grimp.ImportGraph) -> None:
    package = name_of(folder) + "."
    inside = [(a, b) for a, b in arrows_of(imports) if a.startswith(package) and b.startswith(package)]
    neighbours = [(a[len(package) :].split(".")[0], b[len(package) :].split(".")[0]) for a, b in inside]
    assert a_circle((a, b) for a, b in neighbours if a != b) == []
