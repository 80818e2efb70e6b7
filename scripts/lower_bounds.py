"""Prints the oldest versions that pyproject.toml admits, as constraints for pip: ``name==bound``, one a line.

``make setup OLDEST=1`` installs these. Tools of the tests and of the documentation are not held back.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("fast", "metrics", "parquet", "plot", "solana")
"""Extras whose packages the library itself imports."""

ALSO = ("accelerate",)
"""What only tests install, but users bring along: transformers.Trainer works with it."""

SAME = {"pytorch-lightning": "lightning"}
"""Packages that come with one of ours and must have its version: Lightning under its other name."""

BOUND = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)>=(?P<version>[0-9.]+)")


def lower_bounds(pyproject: str) -> list[str]:
    """Constraints from the text of a pyproject.toml.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    bounds: dict[str, str] = {}
    beside = [one for one in extras["test"] if one.startswith(ALSO)]
    for requirement in [*project["dependencies"], *(one for extra in EXTRAS for one in extras[extra]), *beside]:
        found = BOUND.match(requirement)
        if found is None:
            raise ValueError(f"{requirement!r} has no lower bound: write name>=version first")
        bounds[found["name"]] = found["version"]
    bounds |= {name: bounds[twin] for name, twin in SAME.items()}
    return [f"{name}=={version}" for name, version in bounds.items()]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "pyproject.toml"
    print(*lower_bounds(path.read_text()), sep="\n")
