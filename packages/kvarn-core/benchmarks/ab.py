"""Kernel times of two commits, measured in turns on one GPU, and what `kvarn-eval compare` says.

    python packages/kvarn-core/benchmarks/ab.py main --out ab-results

The base is where this checkout left the commit that is named. Each side runs `bench_ops.py` from
its own tree, in processes of its own with kernel caches of their own, in the order base, head,
head, base, so that a drift of the clocks falls on both. Both sides run in this environment: a
change of the locked packages is not part of what is compared. Arguments after `--` go to
`bench_ops.py`.

Leaves base.json and head.json with the pooled samples, and comparison.txt. Exit status: that of
`kvarn-eval compare`; 1 if a benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ORDER = ("base", "head", "head", "base")
BENCH = ("--quick", "--ours-only")
PACKAGES = ("kvarn-core", "kvarn-vllm", "kvarn-eval")


def pool(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Join runs of one commit: all samples of each measurement, median and noise from all.

    Raises
    ------
    ValueError
        If the runs did not measure the same things at the same commit.
    """
    first = documents[0]
    for other in documents[1:]:
        for field in ("suite_sha256", "git", "arms"):
            if other[field] != first[field]:
                raise ValueError(f"Runs of one side differ in {field}. Measure again.")
    pooled = []
    for measurement in first["measurements"]:
        samples = [x for document in documents for x in _samples(document, measurement)]
        median = statistics.median(samples)
        noise = 1.4826 * statistics.median(abs(x - median) for x in samples)
        pooled.append({**measurement, "samples": samples, "median": median, "noise": noise})
    seconds = sum(document["seconds"] for document in documents)
    return {**first, "seconds": round(seconds, 1), "measurements": pooled, "gates": []}


def _samples(document: dict[str, Any], wanted: dict[str, Any]) -> list[float]:
    for measurement in document["measurements"]:
        if (measurement["arm"], measurement["name"]) == (wanted["arm"], wanted["name"]):
            return list(measurement["samples"])
    raise ValueError(f"One run did not measure {wanted['arm']}:{wanted['name']}. Measure again.")


def environment(tree: Path, caches: Path) -> dict[str, str]:
    """Environment in which a side imports its own tree and compiles into its own caches."""
    kept = {key: value for key, value in os.environ.items() if key != "KVARN_COMMIT"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(tree / "packages" / name / "src") for name in PACKAGES),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "KVARN_CACHE_DIR": str(caches / "kvarn"),
    }


def measure(trees: dict[str, Path], out: Path, bench: list[str]) -> None:
    """Run the benchmark of both trees in turns; leaves one pooled document per side in `out`."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in trees}
    for turn, side in enumerate(ORDER):
        path = out / "runs" / f"{turn}-{side}.json"
        path.parent.mkdir(exist_ok=True)
        print(f"Turn {turn + 1} of {len(ORDER)}: {side}", flush=True)
        script = str(trees[side] / "packages/kvarn-core/benchmarks/bench_ops.py")
        command = [sys.executable, script, *bench, "--out", str(path)]
        caches = out.resolve() / "caches" / side
        subprocess.run(command, check=True, env=environment(trees[side], caches))  # noqa: S603
        found[side].append(json.loads(path.read_text(encoding="utf-8")))
    for side, documents in found.items():
        text = json.dumps(pool(documents), indent=1, allow_nan=False)
        (out / f"{side}.json").write_text(text + "\n", encoding="utf-8")


def compare(out: Path) -> int:
    """Let `kvarn-eval compare` judge both documents; keeps what it prints, returns its status."""
    command = ["kvarn-eval", "compare", str(out / "base.json"), str(out / "head.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    (out / "comparison.txt").write_text(done.stdout, encoding="utf-8")
    print(done.stdout, flush=True)
    return done.returncode


def git(*arguments: str) -> str:
    """Output of a git command in this checkout; ends the program if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def main(line: list[str] | None = None) -> int:
    """Measure, compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="commit or branch that this checkout is compared with")
    parser.add_argument("--out", type=Path, default=Path("ab-results"), help="folder for results")
    parser.add_argument("bench", nargs="*", help=f"for bench_ops.py; {' '.join(BENCH)} if none")
    options = parser.parse_args(line)
    root = Path(git("rev-parse", "--show-toplevel"))
    commit = git("merge-base", options.base, "HEAD")
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out.resolve() / "base-tree"
    git("worktree", "add", "--force", "--detach", str(base), commit)
    try:
        measure({"base": base, "head": root}, options.out, options.bench or list(BENCH))
    except (subprocess.CalledProcessError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        git("worktree", "remove", "--force", str(base))
    return compare(options.out)


if __name__ == "__main__":
    sys.exit(main())
