"""Child process behind `bench_serve`: ``python -m kvarn_eval.bench_child``.

Every line on standard input is a load: a JSON object with the options of ``vllm bench serve``, a
log, and a file that is written when the load is over, with what went wrong. So vLLM is imported
once for all loads of a server, which takes longer than many of them; its command line also refuses
to start where vLLM is installed under another name, as its CPU build is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Parse the options of ``vllm bench serve`` and do it, until standard input ends."""
    from vllm.benchmarks.serve import add_cli_args  # noqa: TID251
    from vllm.benchmarks.serve import main as serve  # noqa: TID251

    parser = argparse.ArgumentParser(description=__doc__)
    add_cli_args(parser)
    for line in sys.stdin:
        load = json.loads(line)
        _print_to(Path(load["log"]))
        problem = ""
        try:
            serve(parser.parse_args(load["options"]))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        sys.stderr.flush()
        over = Path(load["over"])
        unfinished = over.with_suffix(".part")
        unfinished.write_text(problem, encoding="utf-8")
        unfinished.rename(over)


def _print_to(log: Path) -> None:
    """Send what this process prints to a file of its own."""
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


if __name__ == "__main__":
    main()
