"""Command line: ``python -m kvarn_vllm doctor`` and ``python -m kvarn_vllm vllm ...``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : list of str, optional
        Command line without the program name; that of this process by default.

    Returns
    -------
    int
        0; 1 if the doctor found that the plugin is not armed, 2 if the model cannot be served.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["vllm"]:
        return _vllm(arguments[1:])

    parser = argparse.ArgumentParser(prog="python -m kvarn_vllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what this installation would do")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--model", help="folder or name of a model, for its sizes")
    commands.add_parser("vllm", help="vLLM's own command line, with the plugin loaded first")
    return _doctor(parser.parse_args(arguments))


def _doctor(options: argparse.Namespace) -> int:
    from kvarn_vllm.doctor import as_text, report

    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to standard output
            found = report(options.model)
    except ValueError as error:
        print(f"KVarN: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0 if found["armed"] else 1


def _vllm(arguments: list[str]) -> int:
    """Run vLLM's command line; some of its commands parse arguments before they load plugins."""
    from kvarn_vllm.patches import arm, fix_command_line

    arm()
    fix_command_line()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", *arguments]
    vllm_main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
