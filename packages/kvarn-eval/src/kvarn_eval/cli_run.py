"""The command ``kvarn-eval run``: a suite, a checkpoint, a folder of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.terminal import (
    console,
    fail_usage,
    failures,
    finish,
    make_folder,
    progress_bars,
    stop_on_signals,
)


def run(
    suite: Annotated[str, typer.Argument(help="Name of a suite, or a TOML file.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint; the small model by default.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, if the model has none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; <suite>-results by default.")] = None,
    parts: Annotated[
        str | None, typer.Option(help="Of accuracy, fidelity, capacity, throughput; all.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Only these arms, the reference among them.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only this scenario; repeatable.")
    ] = None,
    load_format: Annotated[str, typer.Option(help="dummy: random weights.")] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Ranks; those of the suite by default.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=2, help="Items per task of emulated arms.")
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="Arms side by side, if the machine has room; not for speed.")
    ] = 1,
    reuse: Annotated[bool, typer.Option(help="Keep arms measured earlier in this folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result document.")] = False,
) -> None:
    """Run a suite: a server per arm, the same questions, the limits of the suite."""
    from kvarn_eval.preflight import (
        DUMMY,
        PARTS,
        THROUGHPUT,
        check_model,
        weights_sha256,
    )
    from kvarn_eval.small_model.tasks import trained
    from kvarn_eval.stand_in import complete_tokenizer, vocabulary
    from kvarn_eval.suite import load_suite
    from kvarn_eval.suite_arm import Setup
    from kvarn_eval.suite_run import check_all, run_suite

    with failures():
        loaded = load_suite(suite)
        if arms is not None:
            loaded = loaded.only(arms.split(","))
        if scenario:
            loaded = loaded.sending(scenario)
    if items is not None:
        loaded = loaded.model_copy(update={"emulated_items": items})
    if model is None and not loaded.small_model:
        fail_usage(f"Suite {loaded.name} measures your checkpoint. Name its folder with --model.")
    checkpoint = model or SMALL_MODEL
    if loaded.small_model:
        names = {task.name for task in loaded.tasks}
        with failures():
            loaded = loaded.solving(trained(checkpoint))
        if left_out := names - {task.name for task in loaded.tasks}:
            console.print(
                f"Left out: {', '.join(sorted(left_out))}. {checkpoint} has not learnt them.",
                markup=False,
                soft_wrap=True,
            )
    folder = out or Path(f"{loaded.name}-results")
    make_folder(folder)
    chosen = PARTS if parts is None else tuple(parts.split(","))
    setup = Setup(
        suite=loaded.measuring(chosen),
        model=checkpoint,
        tokenizer=tokenizer or checkpoint,
        out=folder,
        parts=chosen,
        load_format=load_format,
        tensor_parallel=tensor_parallel or loaded.tensor_parallel,
        at_once=at_once,
    )
    if at_once > 1 and THROUGHPUT in chosen and loaded.scenarios:
        fail_usage(
            "Arms that run side by side slow each other down. Drop --at-once, or leave throughput "
            "out of --parts."
        )
    stop_on_signals()
    with failures(folder / "result.json"), progress_bars() as progress:
        check_all(setup, progress)
        if load_format == DUMMY:
            ids = vocabulary(check_model(checkpoint, load_format))
            complete = complete_tokenizer(setup.tokenizer, ids, folder / "tokenizer")
            setup = replace(setup, tokenizer=complete)
        else:
            setup = replace(setup, weights_sha256=weights_sha256(checkpoint))
        result = run_suite(setup, progress, reuse=reuse)
    finish(result, folder, as_json)
