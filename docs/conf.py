"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("kvarn-core", "kvarn-vllm", "kvarn-eval")
sys.path[:0] = [str(HERE / "_ext"), *(str(HERE.parent / "packages" / p / "src") for p in PACKAGES)]

import kvarn_core  # noqa: E402

project = "KVarN"
version = release = kvarn_core.__version__
author = "the contributors to KVarN"
copyright = "2026, the contributors to KVarN"

extensions = [
    "generated",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "linkify"]
myst_heading_anchors = 3

# Shapes and dtypes are in the docstrings, which say more than annotations; what is not needed to
# read a docstring is not installed.
autodoc_mock_imports = [
    "httpx", "hypothesis", "matplotlib", "numpy", "pytest", "safetensors", "tokenizers", "torch",
    "transformers", "triton", "vllm",
]  # fmt: skip
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# `name` in a docstring is a link where it names something documented, and code otherwise.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", ".*")]

html_theme = "furo"
html_title = "KVarN"
html_static_path = ["_static"]
html_css_files = ["kvarn.css"]
copybutton_exclude = ".linenos, .gp, .go"
