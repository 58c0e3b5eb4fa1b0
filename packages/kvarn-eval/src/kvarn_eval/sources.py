"""Which sources measured an arm, in one word that results keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarn_eval.schema import Git


def sources(git: Git) -> str:
    """Commit of a checkout, or ``unknown``; ``-dirty`` behind one that has been changed since."""
    return (git.sha or "unknown") + "-dirty" * bool(git.dirty)
