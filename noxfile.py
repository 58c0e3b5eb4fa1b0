"""Every task of the project, for people and for CI: `nox` runs the default sessions.

Environments come from the locked files under requirements/; the three packages are installed
from the checkout without their dependencies, so nothing moves unless a lock file does.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "interpret", "compile", "emulate", "engine"]

ROOT = Path(__file__).parent
PACKAGES = [ROOT / "packages" / name for name in ("kvarn-core", "kvarn-vllm", "kvarn-eval")]
# Eager CPU engines: compiling the warm-up functions would take longer than the tests. Passive
# waiting: threads that spin starve the engine's other processes on a small machine.
ENGINE_ENV = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# suites and the GPUs that they need
SUITES = {
    "smoke": 0,
    "rehearsal": 0,
    "sensitivity": 0,
    "small-model-cpu": 0,
    "small-model": 1,
    "qwen3-32b-one-gpu": 1,
    "qwen3-32b-tp2": 2,
}
OFFLINE_ENV = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
REQUIRED_GPUS = int(os.environ.get("KVARN_REQUIRE_GPU") or 0)
REQUIRE_GPU = f"--require-gpu={max(REQUIRED_GPUS, 1)}"


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() and shutil.which("nvidia-smi") is not None


def install_locked(session: nox.Session, lock: str) -> None:
    """Install one lock file, exactly, and the three packages of this checkout."""
    session.env["UV_HTTP_TIMEOUT"] = "300"
    session.env.update(OFFLINE_ENV)
    session.install("--no-deps", "-r", f"requirements/{lock}.txt")
    session.install("--no-deps", *(arg for path in PACKAGES for arg in ("-e", str(path))))


def install_gpu(session: nox.Session) -> None:
    """Install the CUDA lock, or stop where it would be of no use."""
    if not has_gpu():
        session.skip(f"{session.name} needs one NVIDIA GPU, and this machine has none")
    install_locked(session, "cuda")


def install_wheels(session: nox.Session, lock: str) -> None:
    """Install one lock file, exactly, and the three packages as built wheels."""
    session.env["UV_HTTP_TIMEOUT"] = "300"
    session.env.update(OFFLINE_ENV)
    session.install("--no-deps", "-r", f"requirements/{lock}.txt")
    with tempfile.TemporaryDirectory() as folder:
        for path in PACKAGES:
            session.run("uv", "build", "--wheel", "--quiet", "-o", folder, str(path), external=True)
        wheels = [str(wheel) for wheel in Path(folder).glob("*.whl")]
        session.install("--no-deps", "--reinstall", *wheels)
    name_commit(session)


def name_commit(session: nox.Session) -> None:
    """Say in results which commit wheels were built of, unless sources have changed since."""
    describe = ("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    said = session.run(*describe, external=True, silent=True, success_codes=[0, 128])
    if "KVARN_COMMIT" not in os.environ and re.fullmatch("[0-9a-f]{40}", said.strip()):
        session.env["KVARN_COMMIT"] = said.strip()


@nox.session
def lint(session: nox.Session) -> None:
    """Style, spelling and workflow audit."""
    session.install("--no-deps", "-r", "requirements/lint.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell", "--skip", "*.txt,*.json,*.jsonl,*.svg,./docs/_build", ".")
    session.run("actionlint")
    session.run("zizmor", "--offline", "--no-progress", ".github")
    session.run("python", ".ci/workflows.py")


@nox.session
def types(session: nox.Session) -> None:
    """Strict static types of all three packages."""
    install_locked(session, "cpu")
    for path in PACKAGES:
        session.run("mypy", str(path / "src"))


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs neither a GPU, nor a running engine, nor a kernel."""
    install_locked(session, "cpu")
    arguments = session.posargs or ["packages", "-n", "2"]
    marked = "not engine and not gpu and not kernel and not compile and not emulate"
    session.run("pytest", "-m", marked, *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def interpret(session: nox.Session) -> None:
    """The Triton kernels at small sizes, run by Triton's interpreter on the CPU."""
    install_locked(session, "cpu")
    arguments = session.posargs or ["packages", "-n", "2"]
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    session.run("pytest", "-m", "kernel and not gpu", *arguments, env=environment)


@nox.session
def compile(session: nox.Session) -> None:
    """All kernels compiled for GPUs, without one: no spills, resources as in the tables."""
    install_locked(session, "cpu")
    if session.posargs == ["rewrite"]:
        for test in ("test_compile", "test_compile_cuda"):
            session.run("python", f"packages/kvarn-core/tests/{test}.py")
        return
    session.run("python", "-c", "from kvarn_core import nvrtc; assert not nvrtc.obstacle()")
    arguments = session.posargs or ["packages", "-n", "2"]
    session.run("pytest", "-m", "compile", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def emulate(session: nox.Session) -> None:
    """The CUDA C++ kernels at small sizes, built as C++ and run by an emulator on the CPU."""
    install_locked(session, "cpu")
    session.run("python", "-m", "ziglang", "version")  # without it every test would be skipped
    arguments = session.posargs or ["packages", "-n", "2"]
    session.run("pytest", "-m", "emulate and not gpu", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def engine(session: nox.Session) -> None:
    """Real vLLM CPU engines: paging, prefix cache, preemption, chunked prefill, TP=2."""
    install_locked(session, "cpu")
    arguments = session.posargs or ["packages"]
    session.run("pytest", "-m", "engine", *arguments, env=ENGINE_ENV)


@nox.session
def mutants(session: nox.Session) -> None:
    """One-line sabotages of the product, in a copy; each must turn the tests named for it red."""
    install_locked(session, "cpu")
    session.run("python", ".ci/mutants.py", *session.posargs)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """Kernels and engines on one GPU; what takes long is in soak."""
    install_gpu(session)
    arguments = ["-m", "(gpu or kernel) and not slow", *(session.posargs or ["packages"])]
    environment = {"OMP_NUM_THREADS": "2"}  # with -n the references of many tests share the cores
    session.run("pytest", REQUIRE_GPU, *arguments, env=environment)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The kernels under compute-sanitizer, and two planted bugs that it must find; one GPU."""
    install_gpu(session)
    if shutil.which("compute-sanitizer") is None:
        session.error("sanitize needs compute-sanitizer, which is part of the CUDA toolkit")
    folder = "packages/kvarn-core/tests/sanitizer"
    session.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own
    for check in ("memcheck", "racecheck"):
        tool = ("compute-sanitizer", "--tool", check, "--error-exitcode", "7")
        if check == "memcheck":  # cuda.bindings asks old drivers for new functions, which may fail
            tool += ("--report-api-errors", "no")
        tool += ("python",)
        session.run(*tool, f"{folder}/planted.py", check, external=True, success_codes=[7])
        session.run(*tool, f"{folder}/reduced.py", external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Time every operation on one GPU, beside the caches of stock vLLM."""
    install_gpu(session)
    session.run("python", "packages/kvarn-core/benchmarks/bench_ops.py", *session.posargs)


@nox.session
def ab(session: nox.Session) -> None:
    """Time this checkout against where it left another commit, in turns, on one GPU."""
    install_gpu(session)
    session.run("python", "packages/kvarn-core/benchmarks/ab.py", *session.posargs or ["main"])


@nox.session
def baseline(session: nox.Session) -> None:
    """Time every operation and compare with what was accepted for this GPU, e.g. `-- h100`."""
    if not session.posargs:
        session.error("baseline needs the name of one: nox -s baseline -- h100")
    install_gpu(session)
    accepted = f"packages/kvarn-eval/baselines/{session.posargs[0]}.json"
    bench = "packages/kvarn-core/benchmarks/bench_ops.py"
    session.run("python", bench, "--full", "--out", "bench.json")
    session.run("kvarn-eval", "compare", accepted, "bench.json")


@nox.session
def demo(session: nox.Session) -> None:
    """Serve the small model with both caches, ask both the same problems, print the table."""
    gpu = has_gpu()
    install_locked(session, "cuda" if gpu else "cpu")
    environment = {} if gpu else ENGINE_ENV
    session.run("kvarn-eval", "demo", *session.posargs, env=environment)


@nox.session
def fidelity(session: nox.Session) -> None:
    """Log-probability distance of every cache format from fp16, on the small model."""
    install_locked(session, "cpu")
    session.run("kvarn-eval", "fidelity", *session.posargs, env={"OMP_WAIT_POLICY": "PASSIVE"})


@nox.session
@nox.parametrize("suite", list(SUITES))
def gate(session: nox.Session, suite: str) -> None:
    """A suite from end to end, on built wheels: `nox -s "gate(suite='smoke')"`."""
    gpu, needed = has_gpu(), SUITES[suite]
    if needed and not gpu:
        session.error(f"suite {suite} needs {needed} NVIDIA GPUs, and this machine has none")
    install_wheels(session, "cuda" if gpu else "cpu")
    arguments = ["--out", f"results/{suite}", *session.posargs]
    if "--model" not in arguments and not suite.startswith("qwen3"):
        arguments += ["--model", "packages/kvarn-eval/models/small"]
    session.run("kvarn-eval", "run", suite, *arguments, env={} if gpu else ENGINE_ENV)


@nox.session
def soak(session: nox.Session) -> None:
    """The slow GPU tests: a thousand requests in a full pool, 10,000 batches, a slowed engine."""
    install_gpu(session)
    arguments = session.posargs or ["packages"]
    session.run("pytest", "-m", "gpu and slow", REQUIRE_GPU, *arguments)


@nox.session
def report(session: nox.Session) -> None:
    """Render earlier results again: `nox -s report -- RESULT.json`."""
    if not session.posargs:
        session.error("report needs a result: nox -s report -- results/smoke/result.json")
    install_locked(session, "cpu")
    session.run("kvarn-eval", "report", *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """Train the small model again; needs one GPU."""
    install_gpu(session)
    session.run("kvarn-eval", "train", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the three wheels and install each one alone with plain pip."""
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.install("--no-deps", "-r", "requirements/build.txt")
    for path in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(out), str(path))
    for module in ("kvarn_core", "kvarn_vllm", "kvarn_eval"):
        wheel = next(out.glob(f"{module}-*-py3-none-any.whl"))
        with tempfile.TemporaryDirectory() as folder:
            session.run("python", "-m", "venv", folder, silent=True)
            python = str(Path(folder) / "bin" / "python")
            pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            session.run(*pip, "--find-links", str(out), str(wheel), external=True)
            check = f"import {module}; print({module}.__name__, {module}.__version__)"
            session.run(python, "-c", check, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    session.install("--no-deps", "-r", "requirements/docs.txt")
    session.run("sphinx-build", "-W", "-n", "-b", "html", "docs", "docs/_build")


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve requirements/*.in again."""
    session.install("uv")
    common = ["--universal", "--python-version=3.10", "--generate-hashes", "--quiet"]
    common += ["--no-header", "--no-annotate", "--no-emit-index-url"]
    for name in ("lint", "build", "docs", "cpu", "cuda"):
        extra = ["--override=requirements/overrides.txt"] if name == "cpu" else []
        files = [f"requirements/{name}.in", "-o", f"requirements/{name}.txt"]
        session.run("uv", "pip", "compile", *common, *extra, *session.posargs, *files)


if REQUIRED_GPUS and not has_gpu():
    raise SystemExit("KVARN_REQUIRE_GPU is set, and this machine has no NVIDIA GPU.")
