"""All that a suite observes, one thing after the other or several side by side.

Answers do not depend on what else a machine does, so arms of a small model share one GPU. The
references begin first; the other arms of their profile wait for the texts that they write. An arm
that fails does not stop the others.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import torch

from kvarn_eval.emulated import run_emulated
from kvarn_eval.preflight import ACCURACY
from kvarn_eval.server import end_children
from kvarn_eval.suite_arm import Setup, observe, with_profile
from kvarn_eval.suite_kept import earlier, keep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvarn_eval.lm_tasks import Checked

    Progress = Callable[[str, int, int], None]
    Figures = dict[str, Any]

EMULATED = ("emulated", "arms")
"""Stands for profile and arm of what all emulated arms found."""


def observe_all(
    setup: Setup, checked: dict[str, Checked], progress: Progress, *, reuse: bool
) -> Iterator[tuple[tuple[str, str], Figures]]:
    """Observe every arm on every profile, `setup.at_once` of them at a time.

    Parameters
    ----------
    setup : Setup
        What is compared.
    checked : dict of str to Checked
        By task.
    progress : callable
        Receives what happens, steps done and steps in total; from several threads.
    reuse : bool
        Take what an earlier run with the same plan left in `setup.out`.

    Yields
    ------
    (str, str), dict
        Profile and arm, or `EMULATED`, and what was found, as soon as it is there.

    Raises
    ------
    RuntimeError
        At the end, if a server or a request failed.
    ValueError
        If what is to be reused does not fit.
    """
    suite = setup.suite
    profiles: tuple[str, ...] = suite.profiles
    wanted = [(profile, arm) for profile in profiles for arm in suite.arms]
    wanted.sort(key=lambda what: what[1] != suite.reference)
    if suite.emulated and ACCURACY in setup.parts:
        wanted.insert(0, EMULATED)
    known = {what: earlier(setup, *what) for what in wanted} if reuse else {}
    weights = {profile: with_profile(setup, profile) for profile in profiles if suite.arms}
    pool = ThreadPoolExecutor(setup.at_once)
    jobs: dict[tuple[str, str], Future[Figures]] = {}

    def look(what: tuple[str, str]) -> Figures:
        profile, arm = what
        if what == EMULATED:
            return _emulate(setup, progress)
        ready = None
        if arm != suite.reference:
            reference = jobs[profile, suite.reference]
            ready = reference.result
            if reference.done():
                ready()  # an arm without a reference is not worth a start
        return observe(setup, profile, arm, weights[profile], checked, ready, progress, reuse=reuse)

    try:
        for what in wanted:
            if old := known.get(what):
                jobs[what] = Future()
                jobs[what].set_result(old)
            else:
                jobs[what] = pool.submit(look, what)
        names = {job: what for what, job in jobs.items()}
        failed = []
        for job in as_completed(names):
            if error := job.exception():
                failed.append(error)
            else:
                yield names[job], job.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        raise
    finally:
        pool.shutdown()
    if unexpected := [error for error in failed if not isinstance(error, RuntimeError)]:
        raise unexpected[0]
    if failed:
        raise RuntimeError("\n".join(dict.fromkeys(map(str, failed))))


def _emulate(setup: Setup, progress: Progress) -> Figures:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = run_emulated(setup.suite, setup.model, device, progress)
    figures = [one.model_dump(mode="json") for one in measured]
    return keep(setup, *EMULATED, {"measurements": figures})
