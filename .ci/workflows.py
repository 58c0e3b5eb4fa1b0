"""Workflows and noxfile agree: every session named exists, every default session is required.

    python .ci/workflows.py

In workflows a session is named by `nox -s NAME` in a step or by `session` in a matrix. Prints what
disagrees; exit status 1 if anything does.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"


def named_sessions(workflow: dict[str, Any]) -> set[str]:
    """Sessions that the jobs of a workflow run, without their parameters."""
    found: set[str] = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        found |= set(matrix.get("session", []))
        found |= {row["session"] for row in matrix.get("include", []) if "session" in row}
        for step in job.get("steps", []):
            found |= set(re.findall(r'nox -s "?([\w-]+)', step.get("run", "")))
    return found


def noxfile_sessions(source: str) -> tuple[set[str], set[str]]:
    """All sessions of a noxfile, and those that run by default."""
    sessions: set[str] = set()
    default: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(item).partition("(")[0] for item in node.decorator_list}
            sessions |= {node.name} if "nox.session" in decorators else set()
        elif isinstance(node, ast.Assign):
            if ast.unparse(node.targets[0]) == "nox.options.sessions":
                default = set(ast.literal_eval(node.value))
    return sessions, default


def disagreements(
    workflows: dict[str, set[str]], sessions: set[str], default: set[str]
) -> list[str]:
    """Sentences about sessions that do not exist or that nothing requires."""
    found = [
        f"{name} runs the session {session}, which noxfile.py does not have."
        for name, named in workflows.items()
        for session in sorted(named - sessions)
    ]
    missing = sorted(default - workflows["ci.yml"])
    found += [f"ci.yml does not run the default session {session}." for session in missing]
    return found


def main() -> int:
    """Check this repository; returns the exit status."""
    sessions, default = noxfile_sessions((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    named = {
        path.name: named_sessions(yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(WORKFLOWS.glob("*.yml"))
    }
    found = disagreements(named, sessions, default)
    print("\n".join(found) or f"{len(named)} workflows agree with {len(sessions)} sessions.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
