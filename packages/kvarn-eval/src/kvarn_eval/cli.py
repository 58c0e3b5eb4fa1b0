"""Command line: ``kvarn-eval demo | run | fidelity | throughput | compare | report | train | ...``.

Exit status: 0 all required gates pass, 1 one fails, or a server does, 2 wrong usage, or something
that the measurement needs is missing, 3 the evidence does not decide.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvarn_eval import cli_compare, cli_model
from kvarn_eval import report as reports
from kvarn_eval.cli_run import run
from kvarn_eval.preflight import check_device, check_small_model
from kvarn_eval.schema import Run
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

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
app.command()(run)

ModelOption = Annotated[Path, typer.Option("--model", help="Folder of the small model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result document.")]


def _check_preset(name: str) -> None:
    from kvarn_core import PRESETS

    if name not in PRESETS:
        fail_usage(f"{name} is not a preset. Choose one of {', '.join(PRESETS)}.")


def _engine_args(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        fail_usage(
            f"--engine-args {text} is not a JSON object. Write one, such as "
            """'{"enforce_eager": true}'."""
        )
    return found


def _load_baseline(path: Path, profiles: tuple[str, ...]) -> Run:
    try:
        run = Run.load(path)
    except (OSError, ValueError):
        fail_usage(f"{path} is not a result of this version. Name the result.json of a run.")
    known = {m.key for m in run.measurements}
    if lacking := [name for name in profiles if f"kvarn:{name}.kld_mean" not in known]:
        fail_usage(
            f"{path} does not hold the fidelity of kvarn on profile {lacking[0]}. Name a result of "
            "kvarn-eval fidelity with the same profiles."
        )
    return run


@app.command()
def demo(
    model: ModelOption = SMALL_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("demo-results"),
    kv_cache_dtype: Annotated[str, typer.Option(help="KVarN preset.")] = "kvarn_k4v2_g128",
    items: Annotated[int, typer.Option(min=1, help="Problems per task family.")] = 16,
    cache_mib: Annotated[int, typer.Option(min=64, help="KV cache of each server, MiB.")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Serve the small model with the default cache and with KVarN, and compare them."""
    from kvarn_eval.demo import REFERENCE, TESTED, Settings, run_demo

    _check_preset(kv_cache_dtype)
    make_folder(out)
    stop_on_signals()
    settings = Settings(
        model=model, cache_dtype=kv_cache_dtype, items=items, cache_bytes=cache_mib << 20
    )
    with failures():
        check_small_model(model)
        with progress_bars() as progress:
            run = run_demo(settings, out, progress)
    if not as_json:
        Console().print(reports.comparison(run, REFERENCE, TESTED))
    finish(run, out, as_json)


@app.command()
def fidelity(
    model: ModelOption = SMALL_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("fidelity-results"),
    preset: Annotated[str, typer.Option(help="KVarN preset.")] = "kvarn_k4v2_g128",
    sequences: Annotated[int, typer.Option(min=2, help="Program texts.")] = 8,
    problems: Annotated[int, typer.Option(min=0, help="Problems with answers.")] = 4,
    length: Annotated[int, typer.Option(min=512, max=8192, help="Tokens per text.")] = 2048,
    profile: Annotated[
        list[str] | None, typer.Option(help="Outlier profile: plain, large, tiny; repeatable.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Earlier result.json, to find regressions.", exists=True)
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measure how far each way to store the cache moves the model's predictions."""
    from kvarn_core import PRESETS
    from kvarn_eval.fidelity_gates import PROFILES, Settings, run_fidelity

    _check_preset(preset)
    profiles = tuple(profile or PROFILES)
    if unknown := set(profiles) - set(PROFILES):
        fail_usage(f"Unknown profile {unknown.pop()}. Choose of {', '.join(PROFILES)}.")
    make_folder(out)
    settings = Settings(sequences, problems, length, profiles, PRESETS[preset], device)
    earlier = _load_baseline(baseline, profiles) if baseline else None
    with failures():
        check_small_model(model)
        check_device(device)
        with progress_bars() as progress:
            run = run_fidelity(model, settings, progress, earlier)
    finish(run, out, as_json)


@app.command()
def throughput(
    model: Annotated[str, typer.Option(help="Folder or name of a model.")],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("throughput-results"),
    arms: Annotated[str, typer.Option(help="Of fp16, fp8, turboquant, kvarn.")] = "fp16,kvarn",
    kv_cache_dtype: Annotated[str, typer.Option(help="KVarN preset.")] = "kvarn_k4v2_g128",
    dtype: Annotated[str, typer.Option(help="Model dtype; fp8 uses bfloat16.")] = "float16",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 16_000,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the equal batch.")] = 16,
    output_tokens: Annotated[int, typer.Option(min=4, help="Tokens per answer.")] = 256,
    capacity_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Prompt length with as many requests as fit; 0 skips; all by default."
        ),
    ] = None,
    decode_seconds: Annotated[float, typer.Option(help="Longest decode measurement, s.")] = 30.0,
    burst: Annotated[
        list[str] | None, typer.Option(help="Also this burst, e.g. 64x16000+2048; repeatable.")
    ] = None,
    max_model_len: Annotated[int, typer.Option(help="Longest request, tokens.")] = 20_480,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests at once.")] = 128,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 8192,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of GPU memory.")] = 0.92,
    cache_mib: Annotated[int | None, typer.Option(help="KV cache of this size instead.")] = None,
    load_format: Annotated[str, typer.Option(help="dummy: random weights.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    engine_args: Annotated[str, typer.Option(help="More EngineArgs, as JSON.")] = "{}",
    turboquant_flash_attention: Annotated[
        int | None,
        typer.Option(help="FlashAttention of turboquant, where vLLM's choice, 2, is absent."),
    ] = None,
    arm_seconds: Annotated[float, typer.Option(help="An arm that takes longer is ended.")] = 900.0,
    reuse: Annotated[bool, typer.Option(help="Keep arms measured earlier in this folder.")] = False,
    figures: Annotated[bool, typer.Option(help="Write report and figures.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Speed and capacity of a model with several caches, one engine after the other."""
    import torch

    from kvarn_eval.demo import CPU_ENVIRONMENT
    from kvarn_eval.throughput import Settings, run_throughput

    _check_preset(kv_cache_dtype)
    engine = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "load_format": load_format,
    }
    if tensor_parallel > 1:
        engine["tensor_parallel_size"] = tensor_parallel
    if cache_mib is None:
        engine["gpu_memory_utilization"] = gpu_memory_utilization
    else:
        engine["kv_cache_memory_bytes"] = cache_mib << 20
    engine |= _engine_args(engine_args)
    make_folder(out)
    stop_on_signals()
    with failures():
        settings = Settings(
            model=model,
            arms=tuple(arms.split(",")),
            kv_cache_dtype=kv_cache_dtype,
            dtype=dtype,
            prompt_tokens=prompt_tokens,
            requests=requests,
            output_tokens=output_tokens,
            capacity_tokens=prompt_tokens if capacity_tokens is None else capacity_tokens,
            decode_seconds=decode_seconds,
            bursts=tuple(burst or ()),
            engine=engine,
            turboquant_flash_attention=turboquant_flash_attention,
            environment={} if torch.cuda.is_available() else CPU_ENVIRONMENT,
            arm_seconds=arm_seconds,
        )
        with progress_bars() as progress:
            run, errors = run_throughput(settings, out, progress, reuse=reuse)
    for problem in errors:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    if figures:
        reports.render(run, out)
    if as_json:
        sys.stdout.write(run.model_dump_json(indent=1) + "\n")
    console.print(f"Written: {out}", markup=False, soft_wrap=True)
    console.print(reports.headline(run), markup=False, soft_wrap=True)
    raise typer.Exit(1 if errors else run.verdict.exit_code)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="result.json of an earlier run.", exists=True)],
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", help="Result of the same machine and model, for pareto.svg.", exists=True
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Result of another model, whose quality pareto.svg shows.", exists=True),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Outlier profile whose accuracy pareto.svg shows.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; that of the result by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Render an earlier result again; exits with its verdict."""
    runs = []
    for path in (result, *(others or []), *([answers] if answers else [])):
        try:
            runs.append(Run.load(path))
        except (OSError, ValueError) as error:
            fail_usage(f"{path} is not a result of this version: {error}")
    other_model = runs.pop() if answers else None
    run, folder = runs[0], out or result.parent
    make_folder(folder)
    with failures():
        files = reports.render(run, folder, runs[1:], other_model, profile)
    if as_json:
        sys.stdout.write(run.model_dump_json(indent=1) + "\n")
    console.print(
        f"Written: {', '.join(str(file) for file in files)}", markup=False, soft_wrap=True
    )
    console.print(reports.headline(run), markup=False, soft_wrap=True)
    raise typer.Exit(run.verdict.exit_code)


app.command()(cli_model.solve)
app.command()(cli_model.train)
app.command()(cli_model.examine)
app.command()(cli_compare.compare)
app.command()(cli_compare.baseline)
