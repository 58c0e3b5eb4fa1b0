"""Every refusal sentence of the sources has its row in docs/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kvarn_core
import kvarn_vllm

PAGE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
PLUGIN = sorted(Path(kvarn_vllm.__file__).parent.glob("*.py"))
CORE = [Path(kvarn_core.__file__).parent / f"{name}.py" for name in ("dispatch", "layout", "spec")]
PREFIX = "KVarN: "
BLANK = "\0"  # where a sentence has a value


def text_of(node: ast.AST) -> str | None:
    """A string as it is written, values left blank; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (text_of(part) if isinstance(part, ast.Constant) else BLANK for part in node.values)
        return "".join(part for part in parts if part)
    return None


def refusals(source: str) -> list[str]:
    """Sentences that a file of the plugin or of the core can refuse with, the remedy included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "refusal":
            found.append(text_of(node.args[0]))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            made_here = ast.unparse(node.exc.func) != "refusal"
            found += [text_of(argument) for argument in node.exc.args if made_here]
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("obstacle"):
            returned = [item.value for item in ast.walk(node) if isinstance(item, ast.Return)]
            for value in returned:
                either = value.values if isinstance(value, ast.BoolOp) else [value]
                found += [text_of(part) for part in either if part]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Status":
            found += [text_of(argument) for argument in node.args]
        elif isinstance(node, ast.Return) and node.value:
            text = text_of(node.value)
            found.append(text if text and text.startswith(PREFIX) else None)
    return [text for text in found if text and text.removeprefix(PREFIX).strip(BLANK + " .")]


def needs(source: str) -> list[str]:
    """What a layer may need that the plugin does not implement: keys of dictionaries `needs`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "needs":
            value = node.value  # type: ignore[attr-defined]
            keys = value.keys if isinstance(value, ast.Dict) else [value.key]
            found += [text for key in keys if key and (text := text_of(key))]
    return found


def missing(sentences: list[str], page: str) -> list[str]:
    """Sentences whose fact is in no code span of the page."""
    spans = re.findall(r"`([^`]+)`", page)
    absent = []
    for sentence in sentences:
        fact = sentence.removeprefix(PREFIX).split(". ")[0].rstrip(".").strip(BLANK + " ")
        pattern = ".+".join(map(re.escape, fact.split(BLANK)))
        if not any(re.search(pattern, span) for span in spans):
            absent.append(sentence.replace(BLANK, "X"))
    return absent


@pytest.mark.parametrize("path", [*PLUGIN, *CORE], ids=lambda path: path.stem)
def test_every_refusal_is_on_the_page(path: Path) -> None:
    assert missing(refusals(path.read_text()), PAGE.read_text()) == []


def test_everything_a_layer_may_need_is_on_the_page() -> None:
    source = Path(kvarn_vllm.__file__).with_name("layer_checks.py").read_text()
    page = " ".join(PAGE.read_text().split())
    assert len(needs(source)) >= 10
    assert [need for need in needs(source) if need.split(BLANK)[0] not in page] == []


def test_sentences_are_found_wherever_they_are_made() -> None:
    found = {path.stem: refusals(path.read_text()) for path in [*PLUGIN, *CORE]}
    least = {
        "config": 18,
        "layer_checks": 4,
        "dispatch": 6,
        "patches": 3,
        "signatures": 2,
        "engine": 1,
        "doctor": 1,
    }
    assert {name: len(found[name]) for name in least if len(found[name]) < least[name]} == {}


def test_a_sentence_without_a_row_is_noticed() -> None:
    source = 'raise ValueError(f"KVarN: the moon is {phase} and cannot serve. Wait.")'
    sentences = refusals(source)
    assert missing(sentences, PAGE.read_text()) == ["KVarN: the moon is X and cannot serve. Wait."]
    assert missing(sentences, "| `the moon is full and cannot serve` | night | wait |") == []
