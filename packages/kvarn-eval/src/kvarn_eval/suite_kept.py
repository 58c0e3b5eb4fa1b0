"""What an arm of a suite has shown, kept as one JSON file, and whether a later run may take it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvarn_eval.schema import git_state
from kvarn_eval.sources import sources

if TYPE_CHECKING:
    from kvarn_eval.suite_arm import Setup

ARM = "arm.json"  # all that an arm has shown
LOADS = "loads.json"  # of an arm's completed scenarios


def keep(
    setup: Setup, profile: str, arm: str, found: dict[str, Any], name: str = ARM
) -> dict[str, Any]:
    """Write what was found, at which commit, and what it depends on, for `earlier`."""
    found = {"plan": setup.plan(profile, arm), "commit": sources(git_state()), **found}
    folder = setup.folder(profile, arm)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def earlier(setup: Setup, profile: str, arm: str, name: str = ARM) -> dict[str, Any] | None:
    """What an earlier run found for an arm, or None if there is none.

    Raises
    ------
    ValueError
        If it was made with another suite, checkpoint, machine or text.
    """
    file = setup.folder(profile, arm) / name
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    plan = setup.plan(profile, arm)
    if others := [what for what in plan if found["plan"].get(what, "") != plan[what]]:
        raise ValueError(
            f"{file} was made with other {', '.join(others)}. Remove it or choose another folder."
        )
    return found


def forget(setup: Setup) -> None:
    """Remove what earlier runs left in the folder of a run and this one writes anew."""
    for pattern in ("result.json", "report.md", "texts-*.json", f"*/{ARM}", f"*/{LOADS}"):
        for file in setup.out.glob(pattern):
            file.unlink()
