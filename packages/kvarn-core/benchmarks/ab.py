"""Kernel times of two commits, measured in turns on one GPU, and what `kvarn-eval compare` says.

    python packages/kvarn-core/benchmarks/ab.py main --out ab-results

The base is where this checkout left the commit that is named. Each side runs `bench_ops.py` from
its own tree, in processes of its own with kernel caches of their own, in the order base, head,
head, base, so that a drift of the clocks falls on both. Both sides run in this environment: a
change of the locked packages is not part of what is compared. Arguments after `--` go to
`bench_ops.py`.

Leaves the four results, comparison.json and comparison.md. Exit status: that of `kvarn-eval
compare`, which pools the runs of a side; 1 if a benchmark fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ORDER = ("base", "head", "head", "base")
BENCH = ("--quick", "--ours-only")
PACKAGES = ("kvarn-core", "kvarn-vllm", "kvarn-eval")


def environment(tree: Path, caches: Path) -> dict[str, str]:
    """Environment in which a side imports its own tree and compiles into its own caches."""
    kept = {key: value for key, value in os.environ.items() if key != "KVARN_COMMIT"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(tree / "packages" / name / "src") for name in PACKAGES),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "KVARN_CACHE_DIR": str(caches / "kvarn"),
    }


def measure(trees: dict[str, Path], out: Path, bench: list[str]) -> dict[str, list[Path]]:
    """Run the benchmark of both trees in turns; returns the results of each side."""
    found: dict[str, list[Path]] = {side: [] for side in trees}
    for turn, side in enumerate(ORDER):
        path = out / f"{turn + 1}-{side}.json"
        print(f"Turn {turn + 1} of {len(ORDER)}: {side}", flush=True)
        script = str(trees[side] / "packages/kvarn-core/benchmarks/bench_ops.py")
        command = [sys.executable, script, *bench, "--out", str(path)]
        caches = out.resolve() / "caches" / side
        subprocess.run(command, check=True, env=environment(trees[side], caches))  # noqa: S603
        found[side].append(path)
    return found


def compare(results: dict[str, list[Path]], out: Path) -> int:
    """Let `kvarn-eval compare` judge all runs; returns its exit status."""
    sides = [str(paths[0]) for paths in results.values()]
    for side, paths in results.items():
        sides += [argument for path in paths[1:] for argument in (f"--{side}", str(path))]
    command = ["kvarn-eval", "compare", *sides, "--out", str(out)]
    return subprocess.run(command, check=False).returncode  # noqa: S603


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
        trees = {"base": base, "head": root}
        results = measure(trees, options.out, options.bench or list(BENCH))
    except subprocess.CalledProcessError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        git("worktree", "remove", "--force", str(base))
    return compare(results, options.out)


if __name__ == "__main__":
    sys.exit(main())
