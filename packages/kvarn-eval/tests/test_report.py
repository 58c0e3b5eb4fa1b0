from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from kvarn_eval.report import comparison, format_number, headline, render
from kvarn_eval.schema import Run, Unit, Verdict, measure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    MakeRun = Callable[..., Run]


def test_the_report_holds_verdict_gates_and_numbers(tmp_path: Path, make_run: MakeRun) -> None:
    files = render(make_run(), tmp_path)
    text = files[0].read_text(encoding="utf-8")
    assert text.startswith("# demo: pass\n\nAll required gates pass.")
    assert "| kld | pass | mean KLD <= limit | 0.0123 | 0.02 | mean KLD 0.0123 nats |" in text
    assert "698,880 tokens" in text
    assert "98.0 % (90 – 100)" in text
    assert "kvarn_k4v2_g128" in text
    assert {file.name for file in files[1:]} == {"kld_position_plain.svg", "capacity.svg"}
    assert all(f"({file.name})" in text for file in files[1:])


def test_equal_data_give_equal_files(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        render(run, folder)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_other_data_give_another_figure(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    render(run, tmp_path)
    before = (tmp_path / "capacity.svg").read_bytes()
    data = run.model_dump()
    changed = measure("tokens_per_gib", "kvarn", Unit.TOKENS_PER_GIB, 500_000.0).model_dump()
    names = [(m["name"], m["arm"]) for m in data["measurements"]]
    data["measurements"][names.index(("tokens_per_gib", "kvarn"))] = changed
    render(Run.model_validate(data), tmp_path)
    assert (tmp_path / "capacity.svg").read_bytes() != before


def test_a_curve_of_zeros_is_not_drawn(tmp_path: Path, make_run: MakeRun) -> None:
    data = make_run().model_dump()
    for m in data["measurements"]:
        if "from" in m["context"]:
            m["samples"], m["median"] = [0.0], 0.0
    files = render(Run.model_validate(data), tmp_path)
    assert {file.name for file in files[1:]} == {"capacity.svg"}


def test_the_headline_names_the_gate_that_fails(make_run: MakeRun) -> None:
    assert headline(make_run(Verdict.FAIL)) == ("A required gate fails. kld: mean KLD 0.0123 nats.")


def test_the_headline_names_the_arm_that_failed(make_run: MakeRun) -> None:
    run = make_run().model_copy(update={"failed": {"fp8": "Arm fp8 took too long."}})
    assert headline(run) == "Not all of fp8 was measured."


def test_the_terminal_table_shows_both_arms_and_their_ratio(make_run: MakeRun) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(comparison(make_run(), "fp16", "kvarn"))
    line = next(x for x in console.export_text().splitlines() if "cache pool" in x)
    assert "174,720 tokens" in line
    assert "698,880 tokens" in line
    assert "4.00" in line


def test_numbers_are_readable() -> None:
    shown = [format_number(x) for x in (0, 1, 0.01234567, 4.74, 174720.0, 1234.5, 1e-9)]
    assert shown == ["0", "1", "0.01235", "4.74", "174,720", "1,234", "1e-09"]
