"""Code in the README, the guides and the page on Solana: Python compiles and imports names that are there, commands
have the options.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from distro_optim.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "solana.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = r"^( *)```(\w*)\n(.*?)^\1```$"
    found = re.finditer(pattern, page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [textwrap.dedent(match[3]) for match in found if match[2] in languages]


def missing_names(code: str) -> list[str]:
    """What a block imports from the library that is not there."""
    missing = []
    compile(code, "a block", "exec")  # says more than a parser, such as of what stands outside of a function
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distro_optim":
            module = importlib.import_module(node.module or "")
            missing += [alias.name for alias in node.names if not hasattr(module, alias.name)]
    return missing


def unknown_options(line: str) -> Iterator[str]:
    """Options in a command line of ours that its parser does not know."""
    words = shlex.split(line, comments=True)
    if "distro-optim" not in words:
        return
    parser = _parser()
    for word in words[words.index("distro-optim") + 1 :]:
        commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if word in ("|", "&&", ";", ">", "&") or word.endswith(".py"):
            return  # what follows is another program's
        if commands and word in commands[0].choices:
            parser = commands[0].choices[word]
        elif word.startswith("--") and word.split("=")[0] not in parser._option_string_actions:
            yield word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_imports_what_is_there(page: Path) -> None:
    assert [name for code in blocks(page, "python") for name in missing_names(code)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    lines = [line for text in blocks(page, "sh", "") for line in text.replace("\\\n", " ").splitlines()]
    assert [option for line in lines if "distro-optim " in line for option in unknown_options(line)] == []


def test_a_wrong_option_and_a_wrong_name_are_found() -> None:
    assert list(unknown_options("distro-optim join TICKET --no-such 1  # --nor-this")) == ["--no-such"]
    assert list(unknown_options("distro-optim testnet --peers 2 train.py --its-own 3")) == []
    assert missing_names("from distro_optim import DisTrO, NoSuch") == ["NoSuch"]
    assert sum(len(blocks(page, "python")) for page in PAGES) > 10
    assert sum(text.count("distro-optim ") for page in PAGES for text in blocks(page, "sh", "")) > 5
