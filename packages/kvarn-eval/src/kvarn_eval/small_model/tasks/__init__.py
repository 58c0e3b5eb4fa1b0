"""Four task families whose answers a damaged KV cache gets wrong, one file each.

All open with a table of names and values. A name may be written again: its last value counts. One
rule holds throughout: a name followed by a colon is followed by its value. Names are pairs of
letters from one grid, so every name has many neighbours that differ in one letter, and each look-up
must pick one row among hundreds.

Numbers are written least significant digit first, so that a carry travels in reading order.
Training tables have an even number of rows and held-out tables an odd number: no item is in both
splits. A new family is a file here, an entry in `FAMILIES` and a keyword of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np

from kvarn_eval.small_model.tasks.arith import ARITH
from kvarn_eval.small_model.tasks.graph import GRAPH
from kvarn_eval.small_model.tasks.program import PROGRAM
from kvarn_eval.small_model.tasks.recall import RECALL
from kvarn_eval.small_model.tasks.table import ROW_TOKENS, Family, Floats, Ids
from kvarn_eval.small_model.tokenizer import LETTERS, MAX_LABEL, PAD, decode

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FAMILIES", "Family", "Floats", "Ids", "Item", "family", "grade", "held_out"]

_REGISTRY = {family.name: family for family in (RECALL, ARITH, PROGRAM, GRAPH)}
FAMILIES: tuple[str, ...] = tuple(_REGISTRY)  # the place of a name is part of its items' seeds

PROMPT_WEIGHT = 0.05
"""Weight of the loss on a prompt token; an answer token has 1."""

REWRITES = 0.5
"""Share of table rows that write a name again, in held-out items unless asked otherwise."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One problem: `prompt` is sent, `answer` is the only right continuation."""

    family: str
    seed: int
    prompt: str
    answer: str
    prompt_tokens: int
    answer_tokens: int
    """Includes the end-of-sequence token."""


def family(name: str) -> Family:
    """Look up a family; ValueError if there is none of that name."""
    if name not in _REGISTRY:
        raise ValueError(f"{name} is not a task family. Choose one of {', '.join(FAMILIES)}.")
    return _REGISTRY[name]


def trained(folder: Path) -> tuple[str, ...]:
    """Families that the checkpoint in a folder was trained on, by its `training.json`.

    Without that file nothing is known of the checkpoint, and all of them are returned.
    """
    log = folder / "training.json"
    if not log.is_file():
        return FAMILIES
    try:
        names: list[str] = json.loads(log.read_text(encoding="utf-8"))["families"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log} names no task families. Train the model again.") from error
    return tuple(family(name).name for name in names)


def question_tokens(name: str, questions: int) -> tuple[int, int]:
    """Tokens of everything but the table: in the prompt, and in the answer with its end token."""
    return family(name).tokens(questions)


def make_item(
    name: str,
    seed: int,
    *,
    prompt_tokens: int = 1024,
    questions: int | None = None,
    rewrites: float = REWRITES,
) -> Item:
    """One held-out problem; the same arguments always give the same item.

    Parameters
    ----------
    name : str
        One of `FAMILIES`.
    seed : int
        Number of the item, at least 0.
    prompt_tokens : int
        Upper bound of the prompt, in tokens; the prompt is at most 13 tokens shorter.
    questions : int, optional
        Queries (`recall`, 9 answer tokens each), steps (`arith`, 20), instructions (`program`, 24)
        or hops (`graph`, 8), 1 to 64; by default those of the family.
    rewrites : float
        Share of rows that write a name again, 0 to 1; less where a table would have too few names.
        More of them make look-ups harder.

    Returns
    -------
    Item

    Raises
    ------
    ValueError
        If there is no such family, `questions` is out of range, or the prompt has room for too few
        names or for too many.
    """
    kind = family(name)
    questions = kind.questions if questions is None else questions
    if not 1 <= questions <= MAX_LABEL:
        raise ValueError(f"{questions} questions cannot be labelled. Choose 1 to {MAX_LABEL}.")
    rows = (prompt_tokens - kind.tokens(questions)[0]) // ROW_TOKENS
    rows -= 1 - rows % 2
    fewest = kind.fewest(questions)
    names = max(rows - int(rows * rewrites), fewest)
    if not fewest <= names <= min(rows, len(LETTERS) ** 2):
        raise ValueError(
            f"A prompt of {prompt_tokens} tokens gives {name} a table of {rows} rows. Choose "
            f"prompt_tokens for {fewest} to {len(LETTERS) ** 2} rows of {ROW_TOKENS} tokens."
        )
    rng = np.random.default_rng([FAMILIES.index(name), prompt_tokens, questions, names, seed])
    prompt, answer = kind.generate(rng, 1, rows, rows - names, questions)
    return Item(name, seed, decode(prompt[0]), decode(answer[0]), prompt.size, answer.size)


def held_out(
    name: str,
    count: int,
    *,
    min_tokens: int,
    max_tokens: int,
    questions: int | None = None,
    first_seed: int = 0,
    rewrites: float = REWRITES,
) -> list[Item]:
    """Held-out problems with prompt lengths spread evenly over a range.

    Parameters
    ----------
    name : str
        One of `FAMILIES`.
    count : int
        Number of items.
    min_tokens, max_tokens : int
        Prompt length of the shortest and of the longest item, in tokens (see `make_item`).
    questions, rewrites
        As in `make_item`.
    first_seed : int
        Seed of the first item; the others follow.

    Returns
    -------
    list of Item
    """
    lengths = np.linspace(min_tokens, max_tokens, count).astype(int).tolist()
    return [
        make_item(
            name, first_seed + i, prompt_tokens=length, questions=questions, rewrites=rewrites
        )
        for i, length in enumerate(lengths)
    ]


def grade(item: Item, text: str) -> bool:
    """Whether `text` is the whole answer and nothing else; surrounding space is ignored."""
    return text.strip() == item.answer


def training_batch(rng: np.random.Generator, count: int, length: int) -> tuple[Ids, Ids, Floats]:
    """Training items of all families in equal parts, one per row.

    Half of the rows fill `length`, half are shorter; the share of table and questions varies.

    Parameters
    ----------
    rng : numpy Generator
        Source of everything random.
    count : int
        Rows, a multiple of twice the number of families; families take turns.
    length : int
        Tokens per row, at least 256.

    Returns
    -------
    ids : int64 [count, length]
        Inputs, padded at the end.
    targets : int64 [count, length]
        Next tokens.
    weights : float32 [count, length]
        Of the loss: 1 where the next token belongs to an answer, `PROMPT_WEIGHT` where it belongs
        to a prompt, 0 where there is none.
    """
    ids = np.full((count, length + 1), PAD)
    weights = np.zeros((count, length + 1), dtype=np.float32)
    groups = 2 * len(FAMILIES)
    for group in range(groups):
        kind = _REGISTRY[FAMILIES[group % len(FAMILIES)]]
        full = group < len(FAMILIES)
        room = length + 1 if full else int(rng.integers(length // 2, length + 2))
        per_question = sum(kind.tokens(8)) / 8
        questions = int(np.clip(room * rng.uniform(0.1, 0.6) / per_question, 2, MAX_LABEL))
        rows = (room - sum(kind.tokens(questions))) // ROW_TOKENS
        rows -= rows % 2
        rewrites = min(int(rows * rng.uniform(0, 0.95)), rows - kind.fewest(questions))
        prompt, answer = kind.generate(rng, count // groups, rows, rewrites, questions)
        start, end = prompt.shape[1], prompt.shape[1] + answer.shape[1]
        ids[group::groups, :end] = np.concatenate((prompt, answer), 1)
        weights[group::groups, :start] = PROMPT_WEIGHT
        weights[group::groups, start:end] = 1
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]
