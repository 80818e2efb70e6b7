"""How Sphinx makes the site of these pages: ``make docs`` writes it to ``out/docs``, and any warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from distro_optim import __version__  # noqa: E402

project = "distro_optim"
author = "The distro_optim maintainers"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["images"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as fields of their class: a dataclass declares them a second time

html_theme = "furo"
html_title = f"distro_optim {__version__}"
html_theme_options = {
    "source_repository": "https://github.com/distro-optim/distro_optim/",
    "source_branch": "main",
    "source_directory": "docs/",
}
