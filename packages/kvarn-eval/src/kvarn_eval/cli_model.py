"""The commands ``solve``, ``train`` and ``examine``: the small model itself, without a server."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any, NoReturn

import typer

from kvarn_eval.preflight import check_small_model
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.terminal import console, fail_usage, failures, make_folder, progress_bars

UNFINISHED = 3  # exit status of a training run that was cut short


def _end(out: Path, log: dict[str, Any], as_json: bool) -> NoReturn:
    if as_json:
        sys.stdout.write(json.dumps(log, indent=1) + "\n")
    console.print(f"Written: {out}", markup=False, soft_wrap=True)
    if log["steps"] < log["planned_steps"]:
        console.print(
            f"{log['steps']} of {log['planned_steps']} steps are made. Go on with --resume {out}.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(UNFINISHED)
    raise typer.Exit(0)


def solve(
    family: Annotated[str, typer.Argument(help="recall, arith, program or graph.")],
    model: Annotated[
        Path, typer.Option("--model", help="Folder of the small model.")
    ] = SMALL_MODEL,
    items: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 96,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 1536,
    questions: Annotated[int, typer.Option(help="Queries or steps per problem.")] = 32,
    rewrites: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that rewrite a name.")
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Solve held-out problems with an exact cache, without a server; print the accuracy."""
    from kvarn_eval.small_model.evaluate import exact_match
    from kvarn_eval.small_model.model import SmallModel
    from kvarn_eval.small_model.tasks import make_item, trained

    with failures():
        check_small_model(model)
        if family not in (known := trained(model)):
            fail_usage(f"The model has not learnt {family}. Choose one of {', '.join(known)}.")
        weights, right = SmallModel.load(model), 0
    with failures(), progress_bars() as progress:
        for seed in range(items):
            item = make_item(
                family,
                seed,
                prompt_tokens=prompt_tokens,
                questions=questions,
                rewrites=rewrites,
            )
            right += sum(exact_match(weights, [item]))
            progress(f"{family}, {right} right", seed + 1, items)
    text = f"{family}: {right} of {items} right ({100 * right / items:.1f} %)"
    counts = {"family": family, "items": items, "right": right}
    sys.stdout.write((json.dumps(counts) if as_json else text) + "\n")


def train(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = SMALL_MODEL,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="Stop after this time with a checkpoint, exit status 3.")
    ] = 30.0,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run that was cut short.")] = None,
    key_noise: Annotated[
        float | None, typer.Option(min=0.0, help="Largest noise on keys, of their rms.")
    ] = None,
    value_noise: Annotated[
        float | None, typer.Option(min=0.0, help="Largest noise on values, of their rms.")
    ] = None,
    examine: Annotated[bool, typer.Option(help="Measure the finished model.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the log.")] = False,
) -> None:
    """Train the small model from scratch; needs one CUDA GPU."""
    from kvarn_eval.small_model.examine import Examination
    from kvarn_eval.small_model.train import Plan
    from kvarn_eval.small_model.train import train as train_small_model

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = Plan()
    if key_noise is not None:
        plan = dataclasses.replace(plan, key_noise=key_noise)
    if value_noise is not None:
        plan = dataclasses.replace(plan, value_noise=value_noise)
    make_folder(out)
    with failures():
        log = train_small_model(
            out,
            seed=seed,
            minutes=minutes,
            plan=plan,
            resume=resume,
            examination=Examination() if examine else None,
        )
    _end(out, log, as_json)


def examine(
    model: Annotated[
        Path, typer.Option("--model", help="Folder of a trained model.")
    ] = SMALL_MODEL,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print the log.")] = False,
) -> None:
    """Measure a trained model on held-out problems; complete training.json, write the card."""
    from kvarn_eval.small_model.examine import examine as examine_model

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with failures():
        check_small_model(model)
        log = examine_model(model, device=device)
    _end(model, log, as_json)
