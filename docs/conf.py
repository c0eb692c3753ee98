"""Sphinx configuration."""

import sys
from pathlib import Path

from vitkit import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "vitkit"
author = "the vitkit developers"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
    # writes docs/_generated/ from the catalogue
    "catalogue_pages",
]
html_theme = "furo"
html_title = f"vitkit {__version__}"
exclude_patterns = ["_build", "_ext"]
myst_heading_anchors = 2
myst_enable_extensions = ["colon_fence", "dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False
suppress_warnings = ["myst.header"]
doctest_global_setup = """
import torch
import vitkit
from vitkit.anatomy import Intervene, Trace, zero
from vitkit.models.build import build
from vitkit.models.vit import ViT
"""
