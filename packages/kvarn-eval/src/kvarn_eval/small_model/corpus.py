"""Program text to read: the Python sources of the standard library and of torch.

Language with structure at every range, present wherever this package runs: nothing is downloaded
and nothing copied. The standard library is split by module name, alike in every version of Python;
one module in eight is held out. What is traded away: another Python or torch is another text, so
results carry the hash of what they read.
"""

from __future__ import annotations

import sysconfig
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvarn_eval.preflight import Missing
from kvarn_eval.small_model.tokenizer import EOS, UNK, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvarn_eval.small_model.tasks import Floats, Ids

HELD_OUT_SHARE = 8
"""One standard module in this many is held out."""

WEIGHT = 0.3
"""Weight of the loss on a token of text; an answer token of a task has 1."""

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}
)  # other packages, tests, tables, and what newer versions of Python no longer have


def _files(root: Path) -> Iterator[Path]:
    """Python files below `root` in alphabetical order."""
    for file in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            yield file


def _standard_modules() -> dict[str, list[Path]]:
    """Files of the standard library by top-level module."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[Path]] = {}
    for file in _files(root):
        modules.setdefault(file.relative_to(root).parts[0].removesuffix(".py"), []).append(file)
    return modules


def is_held_out(module: str) -> bool:
    """Whether a top-level module of the standard library is kept from training."""
    return zlib.crc32(module.encode()) % HELD_OUT_SHARE == 0


def _encode(source: bytes) -> list[int]:
    """Token ids of a source; none if it is not plain ASCII."""
    ids = encode(source.decode("ascii", errors="replace"))
    return [] if UNK in ids else ids


def training_ids() -> NDArray[np.uint8]:
    """All training text in one row, an end token after each file.

    Returns
    -------
    uint8 [N]
        Some 40 million token ids.

    Raises
    ------
    preflight.Missing
        If torch or the standard library is installed without sources.
    """
    modules = _standard_modules()
    standard = [file for name in modules if not is_held_out(name) for file in modules[name]]
    torch = find_spec("torch")
    origin = torch.origin if torch else None
    library = list(_files(Path(origin).parent)) if origin else []
    if not standard or not library:
        raise Missing("The sources of Python or torch are missing. Install both as ordinary files.")
    texts = (_encode(file.read_bytes()) for file in (*standard, *library))
    return np.concatenate([np.array([*ids, EOS], dtype=np.uint8) for ids in texts if ids])


def training_rows(
    rng: np.random.Generator, text: NDArray[np.uint8], count: int, length: int
) -> tuple[Ids, Ids, Floats]:
    """Random stretches of training text.

    Parameters
    ----------
    rng : numpy Generator
        Where the stretches begin.
    text : uint8 [N]
        As from `training_ids`; N > `length`.
    count, length : int
        Rows, and tokens per row.

    Returns
    -------
    ids, targets : int64 [count, length]
        Inputs and next tokens.
    weights : float32 [count, length]
        Of the loss, all `WEIGHT`.
    """
    starts = rng.integers(0, len(text) - length, count)
    ids = np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64)
    return ids[:, :-1], ids[:, 1:], np.full((count, length), WEIGHT, dtype=np.float32)


def held_out_texts(count: int, length: int) -> dict[str, list[int]]:
    """The beginnings of held-out files, at most one of each module.

    Parameters
    ----------
    count : int
        Number of texts.
    length : int
        Tokens per text.

    Returns
    -------
    dict of str to list of int
        Token ids by path inside the standard library; of a module the longest file. The order of
        the modules is that of their CRC-32.

    Raises
    ------
    ValueError
        If fewer held-out modules have a file of that length.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = {name: files for name, files in _standard_modules().items() if is_held_out(name)}
    texts = {}
    for _, files in sorted(modules.items(), key=lambda item: zlib.crc32(item[0].encode())):
        longest = max(files, key=lambda file: file.stat().st_size)
        ids = _encode(longest.read_bytes()[: 4 * length])  # no common token is longer than [64]
        if len(ids) >= length:
            texts[longest.relative_to(root).as_posix()] = ids[:length]
        if len(texts) == count:
            return texts
    raise ValueError(
        f"Only {len(texts)} held-out modules of Python have {length} tokens. Ask for fewer or "
        "shorter texts."
    )
