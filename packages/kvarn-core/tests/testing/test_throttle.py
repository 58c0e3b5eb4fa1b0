from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvarn_core.testing import throttle

if TYPE_CHECKING:
    from collections.abc import Iterator

REPORT = """
    Performance State                                  : P0
    Clocks Event Reasons
        SW Power Cap                                   : Active
        HW Slowdown                                    : Not Active
            HW Thermal Slowdown                        : Not Active
            HW Power Brake Slowdown                    : Not Active
        SW Thermal Slowdown                            : Not Active
    Clocks Event Reasons Counters
        SW Power Capping                               : 9000000 us
        Sync Boost                                     : 0 us
        SW Thermal Slowdown                            : 1500 us
        HW Thermal Slowdown                            : 20 us
        HW Power Braking                               : 3 us
"""


def test_counters_are_added_and_states_are_not() -> None:
    assert throttle.counted(REPORT) == 1523
    assert throttle.counted(REPORT + REPORT) == 2 * 1523  # two GPUs


@pytest.mark.parametrize("report", ["", "NVIDIA-SMI has failed", REPORT.replace(" us", "")])
def test_a_driver_that_does_not_count_says_nothing(report: str) -> None:
    assert throttle.counted(report) is None


def _counter(*values: int | None) -> Iterator[int | None]:
    yield from values


@pytest.mark.parametrize(
    ("counts", "runs"), [((5, 5), 1), ((5, 6, 6, 6), 2), ((0, 9, 9, 10, 10, 10), 3)]
)
def test_a_measurement_is_repeated_until_nothing_slowed_down(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], runs: int
) -> None:
    values = _counter(*counts)
    monkeypatch.setattr(throttle, "slowdown_us", lambda: next(values))
    done: list[int] = []
    assert throttle.unthrottled(lambda: done.append(1) or len(done)) == runs


def test_a_gpu_that_always_slows_down_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _counter(*range(6))
    monkeypatch.setattr(throttle, "slowdown_us", lambda: next(values))
    with pytest.raises(RuntimeError, match="slowed down"):
        throttle.unthrottled(lambda: 1)


def test_without_a_driver_everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "COMMAND", ("no-such-program",))
    assert throttle.slowdown_us() is None
    assert throttle.unthrottled(lambda: 7) == 7
