"""Sphinx configuration."""

from __future__ import annotations

project = "KVarN"
author = "the contributors to KVarN"
copyright = "2026, the contributors to KVarN"
version = release = "0.1.0"

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath", "linkify"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "KVarN"
nitpicky = True
