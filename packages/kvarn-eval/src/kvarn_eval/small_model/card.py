"""The card of a trained small model, `README.md` beside its weights, written from its log."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from kvarn_eval.small_model import tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvarn_eval.small_model.model import SmallModel

VERSION = "small-v3"

_FAMILIES = {
    "recall": (
        "`<recall>qB:417;xB:@qZ;...?[1]xB[2]qB=` → `[1]xB:@qZ:903;[2]qB:417;`. A value `@name` is "
        "a link that is followed once. One query in four is a link."
    ),
    "arith": (
        "`<arith>qB:417;...?[1]qB+xZ;[2][1]-cB;=` → `[1]qB:417+xZ:209=[1]:616;[2][1]:616-cB:...`. "
        "Every step but the first reads the result of an earlier one."
    ),
    "program": (
        "`<program>qB:417;...?[1]qB+xZ;[2]qB~cB;=` → `[1]qB:417+xZ:209=qB:616;[2]qB:616~cB:...`. "
        "Sums, copies, exchanges and conditions overwrite registers; every read depends on all "
        "writes before it."
    ),
    "graph": (
        "`<graph>qB:@xZ;xZ:@cD;...?[64]qB=` → `[1]qB:@xZ;[2]xZ:@cD;...`. A walk along a "
        "permutation; one wrong step spoils the rest."
    ),
}
_TEMPLATE = """\
# {version}: a trained Qwen3 model of {millions:.1f} M parameters

A language model that looks things up exactly, from prompts of 1K to 8K tokens, and stops doing so
when its KV cache is damaged; and that predicts program text, so that damage shows on ordinary
structure as well. It measures caches; it is of no other use. `kvarn-eval examine` writes this page.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM`: {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, \
MLP {shape.intermediate_size}, {shape.num_attention_heads} query heads, \
{shape.num_key_value_heads} KV heads, head_dim {shape.head_dim}, QK-norm, \
RoPE (θ = {shape.rope_theta:,.0f}), tied embeddings |
| parameters | {count:,}; `model.safetensors` is fp16, {megabytes:.1f} MB, SHA-256 `{digest}` |
| context | {shape.max_position_embeddings:,} tokens |
| vocabulary | {shape.vocab_size} rows, {used} in use: one token per ASCII character or keyword, \
no merges |
| license | Apache-2.0, as the rest of the repository |
| training text | Python sources as installed, read and not redistributed: the standard library of \
CPython {log[python]} (PSF License) and torch {log[torch]} (BSD-3-Clause) |

## What it does

Every problem opens with a table of two-letter names and values, `qB:417;`. A name may be written
again; its last value counts. Numbers are modulo 1,000, least significant digit first.

{families}
- program text: Python source, one token per character. One module of the standard library in eight
  is held out, by a hash of its name; {text[loss]:.3f} nats per character there
  ({text[tokens]:,} characters of {files} files, listed in `training.json`).

All problems are synthetic and fresh in every training step. Training tables have an even number of
rows, held-out tables an odd number, so no problem is in both.

## Accuracy

Greedy, fp16, exact match of the whole answer. Questions per item: {sizes}.
"Rewrites" is the share of rows that write a name again; columns are tokens per prompt, at most.

{accuracy}

## Training

| | |
|---|---|
| command | `kvarn-eval train --seed {log[seed]} --key-noise {noise[key]} \
--value-noise {noise[value]} --out <folder>`, commit `{log[commit]}` |
| machine | {log[gpu]}, torch {log[torch]}, bf16 autocast over fp32 weights |
| time | {log[seconds]:.0f} s for {log[steps]:,} steps |
| data | {log[tokens]:,} tokens, two thirds problems and one third program text \
({log[text_tokens]:,} characters, read repeatedly) |
| noise | in half of the rows, up to {noise[key]} of the root mean square of keys and \
{noise[value]} of values, so that answers survive a good cache |
| optimizer | Muon for the matrices of the layers, AdamW for the rest; cosine to zero |
| export | residual stream and MLP a sixteenth as large, by exact powers of two: the same \
function, without overflow in fp16 |

Means over the steps before each row, rows with noise left out; "items" is the share of training
rows that are right as a whole. The loss counts answers, prompts and program text with their
weights, rows with noise included. All rows are in `training.json`.

{curve}

The same seed gives the same items everywhere; another GPU or torch gives other bits and the same
accuracy within noise, and another Python or torch reads another text.
"""
_KEPT = 10  # rows of the training log that the card shows


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _accuracy(log: dict[str, Any]) -> str:
    cells = log["accuracy"]
    lengths = sorted({cell["longest_prompt"] for cell in cells})
    rows: dict[tuple[str, float], list[str]] = {}
    for cell in cells:
        rows.setdefault((cell["family"], cell["rewrites"]), []).append(
            f"{cell['right']}/{cell['items']}"
        )
    header = ["family", "rewrites", *(f"{n:,}" for n in lengths)]
    return _table(header, ([f, f"{share:.2f}", *right] for (f, share), right in rows.items()))


def _sizes(log: dict[str, Any]) -> str:
    found = {cell["family"]: cell for cell in log["accuracy"]}
    return ", ".join(
        f"`{name}` {cell['questions']} ({cell['answer_tokens']} tokens)"
        for name, cell in found.items()
    )


def _curve(log: dict[str, Any]) -> str:
    curve, names = log["curve"], log["families"]
    shown = [curve[round(i * (len(curve) - 1) / (_KEPT - 1))] for i in range(_KEPT)]
    unique = {point["step"]: point for point in (curve if len(curve) <= _KEPT else shown)}
    columns = [*(f"{name}_tokens" for name in names), *(f"{name}_items" for name in names)]
    header = ["step", "seconds", "loss", "text loss", *(c.replace("_", " ") for c in columns)]
    rows = (
        [
            f"{point['step']:,}",
            f"{point['seconds']:.0f}",
            f"{point['loss']:.3f}",
            f"{point['text_loss']:.3f}",
            *(f"{point[column]:.5f}" for column in columns),
        ]
        for point in unique.values()
    )
    return _table(header, rows)


def write(folder: Path, model: SmallModel, log: dict[str, Any]) -> None:
    """Write `README.md` in the folder of a model.

    Parameters
    ----------
    folder : Path
        With `model.safetensors`.
    model : SmallModel
        The model in it.
    log : dict
        Content of `training.json`, examination included.
    """
    weights = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    count = sum(p.numel() for p in model.parameters())
    text = _TEMPLATE.format(
        version=VERSION,
        millions=count / 1e6,
        megabytes=len(weights) / 1e6,
        count=count,
        digest=" ".join(digest[i : i + 8] for i in range(0, len(digest), 8)),
        shape=model.config,
        used=len(tokenizer.TOKENS),
        log=log,
        noise=log["noise"],
        text=log["held_out_text"],
        files=len(log["held_out_text"]["files"]),
        families="\n".join(f"- `{name}`: {_FAMILIES[name]}" for name in log["families"]),
        sizes=_sizes(log),
        accuracy=_accuracy(log),
        curve=_curve(log),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
