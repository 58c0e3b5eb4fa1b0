"""Child process behind `bench_serve`: ``python -m kvarn_eval.bench_child OPTIONS``.

The same as ``vllm bench serve OPTIONS``, whose command line refuses to start where vLLM is
installed under another name, as its CPU build is.
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse the options of ``vllm bench serve`` and do it."""
    from vllm.benchmarks.serve import add_cli_args  # noqa: TID251
    from vllm.benchmarks.serve import main as serve  # noqa: TID251

    parser = argparse.ArgumentParser(description=__doc__)
    add_cli_args(parser)
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
