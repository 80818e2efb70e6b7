"""What the documents name is there: files, links, public names, errors; and pictures say what their pages say."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import distro_optim
from distro_optim import errors, testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "distro_optim"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
OURS = "https://github.com/distro-optim/distro_optim/blob/main/"
RAW = "https://raw.githubusercontent.com/distro-optim/distro_optim/main/"
README_WORDS = 1000
LINE = 120

USERS_SCRIPTS = {"train.py", "my_script.py", "script.py", "lightning_bytes.py", "byte_data.py", "byte_model.py"}
"""Names that a page gives to a script of the reader's."""

SENDERS = {"", "bystander", "joiner", "member", "regular", "observer", "host"}
"""The rows of docs/security.md that say who is who."""


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links(text: str) -> Iterator[str]:
    """Targets of links and images, without the part behind ``#``; not those in code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)", text, flags=re.M)]:
        yield target.split("#")[0]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    missing = []
    for target in links(page.read_text(encoding="utf-8")):
        if target.startswith((OURS, RAW)):
            found = (ROOT / target.removeprefix(OURS).removeprefix(RAW)).exists()
        elif target.startswith(("http://", "https://")) or not target:
            continue
        else:
            found = (page.parent / target).exists()
        if not found:
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_of_code_that_are_named_are_there(page: Path) -> None:
    names = {
        path.name
        for folder in ("src", "tests", "benchmarks", "examples", "docs", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    missing = []
    for name in re.findall(r"[\w./-]*\w\.py\b", page.read_text(encoding="utf-8")):
        path = name.lstrip("./").removeprefix("src/").removeprefix("distro_optim/")
        if path in USERS_SCRIPTS or path.startswith("path/to"):
            continue
        if "/" in path:
            path = re.sub(r"^.*/blob/main/", "", path)
            found = any((folder / path).is_file() for folder in (ROOT, PACKAGE))
        else:
            found = path in names
        if not found:
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md"], ids=page_id)
def test_folders_of_code_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+)`", page.read_text(encoding="utf-8"))
    places = [ROOT, PACKAGE, PACKAGE / "strategy"]
    assert [name for name in named if not any((place / name).is_dir() for place in places)] == []
    assert named


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_prose_is_wrapped(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    long = [line for line in text.splitlines() if len(line) > LINE and not line.startswith(("|", "    ", "[", "!["))]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_prose_is_ordinary_english(page: Path) -> None:
    unusual = r"\b(whoever|anew|for ever|to be had|in its stead|Who (joins|comes|differs|goes|is outside))\b"
    assert [match[0] for match in re.finditer(unusual, page.read_text(encoding="utf-8"), flags=re.I)] == []


def test_the_readme_can_be_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_the_readme_links_absolutely_as_it_is_read_elsewhere_too() -> None:
    targets = list(links((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_project_has_one_address() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    home = urls["Homepage"]
    for url in urls.values():
        assert url.startswith(home)
        path = re.sub(r"^/(blob|tree)/main/", "", url.removeprefix(home))
        assert path in ("", "/issues") or (ROOT / path).exists(), url
    templates = [*(ROOT / ".github").rglob("*.yml"), *(ROOT / ".github").rglob("*.md")]
    files = [*PAGES, *PACKAGE.rglob("*.py"), *templates, DOCS / "conf.py", ROOT / "pyproject.toml"]
    named: dict[str, set[str]] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"https://(?:github|raw\.githubusercontent)\.com/([\w.-]+/distro_optim)\b", text):
            named.setdefault(name, set()).add(file.name)
    assert named.keys() == {home.removeprefix("https://github.com/")}
    assert {"README.md", "SECURITY.md", "conf.py", "config.yml", "hub.py"} <= named[
        home.removeprefix("https://github.com/")
    ]


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", text, flags=re.M))
    public = {f"distro_optim.{name}" for name in {*distro_optim.__all__, *distro_optim._HOMES}}
    public |= {f"distro_optim.testing.{name}" for name in testing.__all__}
    assert sorted(public - documented) == []
    assert sorted(documented - public) == ["distro_optim.errors", "distro_optim.testing"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_public_names_are_imported_by_their_short_names(page: Path) -> None:
    imports = re.findall(r"from distro_optim\.(\S+) import (.+)", page.read_text(encoding="utf-8"))
    imported = {name.strip() for module, names in imports if module != "testing" for name in names.split(",")}
    assert sorted(imported & {*distro_optim._HOMES}) == []


def test_every_error_has_advice() -> None:
    headings = re.findall(r"^### (\w+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.M)
    classes = [name for name in errors.__all__ if name.endswith("Error")]
    assert sorted(headings) == sorted(classes)


@pytest.mark.slow
def test_texts_of_errors_that_are_quoted_are_those_of_the_code() -> None:
    texts = "\n".join(
        node.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(r"^\| (`[^|]+`) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.M)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    pieces = [piece.strip() for text in quoted for piece in re.split(r"\.\.\.|\bN\b", text) if len(piece.strip()) > 2]
    assert [piece for piece in pieces if piece not in texts] == []
    assert pieces


def test_every_benchmark_has_a_page_with_its_command_and_date() -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in (DOCS / "benchmarks").glob("*.md")}
    everything = "\n".join(pages.values())
    assert [b.name for b in (ROOT / "benchmarks").glob("*.py") if f"benchmarks/{b.name}" not in everything] == []
    for page, text in pages.items():
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", text), page
        assert page.name == "index.md" or re.search(r"^    (python|make) ", text, flags=re.M), page


def test_pictures_say_what_their_pages_say() -> None:
    drawings = runpy.run_path(str(DOCS / "images" / "draw.py"))["drawings"]
    stale = [name for name, svg in drawings().items() if (DOCS / "images" / name).read_text(encoding="utf-8") != svg]
    assert stale == [], "run python docs/images/draw.py"


def test_every_picture_is_shown() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = [path.name for path in (DOCS / "images").iterdir() if path.suffix in (".png", ".svg")]
    assert [name for name in pictures if f"images/{name}" not in text] == []


def test_each_row_about_who_may_do_what_names_a_test_that_exists() -> None:
    rows = [
        line
        for line in (DOCS / "security.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and line.count("|") in (5, 6, 7) and not line.startswith(("| message", "| request"))
    ]
    rows = [row for row in rows if row.split("|")[1].strip() not in SENDERS]
    assert len(rows) > 30
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    written = set(re.findall(r"^(?:async )?def (test_\w+)", tests, flags=re.M))
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named, f"no test: {row}"
        assert named <= written, f"no such test: {sorted(named - written)}"
