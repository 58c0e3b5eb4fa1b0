"""Measures a quantised KV cache as a user would: is the text right, and how much more fits?"""

from __future__ import annotations

__version__ = "0.1.0"
