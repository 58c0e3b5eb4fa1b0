"""The hunt for mutants finds survivors, and its list fits the sources."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

CI = Path(__file__).parents[3] / ".ci"


def load_hunt() -> Any:
    spec = importlib.util.spec_from_file_location("mutants", CI / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


HUNT = load_hunt()
MUTANTS = HUNT.load(CI / "mutants.toml")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_entry_fits_the_sources(mutant: Any, tmp_path: Path) -> None:
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    source = (CI.parent / mutant.file).read_text(encoding="utf-8")
    copy.write_text(source, encoding="utf-8")
    assert mutant.apply(tmp_path) == source
    changed = copy.read_text(encoding="utf-8")
    assert changed != source
    compile(changed, str(copy), "exec")
    for test in mutant.tests:
        assert (CI.parent / test.partition("::")[0]).is_file()


PRODUCT = "def double(x):\n    return 2 * x\n"
TEST = "from product import double\n\ndef test_double():\n    assert double({}) == {}\n"
SURVIVOR = HUNT.Mutant(
    name="square",
    file="product.py",
    line="return 2 * x",
    becomes="return x**2",
    tests=["test_it.py"],
)


def tree(folder: Path, x: int) -> Path:
    (folder / "product.py").write_text(PRODUCT, encoding="utf-8")
    (folder / "test_it.py").write_text(TEST.format(x, 2 * x), encoding="utf-8")
    (folder / "conftest.py").write_text(
        "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n",
        encoding="utf-8",
    )
    return folder


def test_a_survivor_is_named_and_the_source_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, caught = tree(tmp_path, 2), replace(SURVIVOR, name="triple", becomes="return 3 * x")
    HUNT.check_green(root, [SURVIVOR, caught])
    assert HUNT.hunt(root, [SURVIVOR, caught]) == ["square"]
    assert (root / "product.py").read_text(encoding="utf-8") == PRODUCT
    shown = capsys.readouterr().out
    assert "[ 1 of 2] SURVIVED square" in shown
    assert "[ 2 of 2] caught   triple" in shown


def test_tests_that_are_red_before_any_change_say_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, 3)
    (root / "product.py").write_text(PRODUCT.replace("2", "5"), encoding="utf-8")
    with pytest.raises(HUNT.WrongEntry, match="not green before any change"):
        HUNT.check_green(root, [SURVIVOR])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"line": "return 3 * x"}, "has 0 lines"),
        ({"file": "nowhere.py"}, "there is no nowhere.py"),
        ({"becomes": "return 2 * x"}, "does not change"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(HUNT.WrongEntry, match=message):
        replace(SURVIVOR, **change).apply(tree(tmp_path, 3))


def test_a_mutant_under_which_no_test_runs_is_wrong(tmp_path: Path) -> None:
    broken = replace(SURVIVOR, becomes="return (")
    with pytest.raises(HUNT.WrongEntry, match="the tests did not run"):
        HUNT.hunt(tree(tmp_path, 3), [broken])


def test_an_unknown_name_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert HUNT.main(["no such mutant"]) == 2
    assert "No mutant is called no such mutant" in capsys.readouterr().err
