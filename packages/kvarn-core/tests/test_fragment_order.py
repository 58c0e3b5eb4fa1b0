"""The order of codes and vectors against the register ownership of `mma.m16n8k16`, in numpy.

Ownership (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4:
A0 holds row g, columns 2t and 2t+1; A1 row g+8; A2 row g, columns + 8; A3 both. B0 holds rows
2t and 2t+1 of column g; B1 rows + 8. C0 holds row g, columns 2t and 2t+1; C1 row g+8.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from kvarn_core.layout import k_order, m_order
from kvarn_core.ops.quantize.reference import pack_codes

Array = np.ndarray[Any, Any]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def _codes_in_lanes(codes: Array, bits: int) -> Array:
    """Packed words as lanes load them: [chunks, 32 lanes, 4 registers]."""
    packed = pack_codes(torch.from_numpy(codes)[None], bits)[0].numpy()
    return packed.view("<u4").reshape(-1, 32, 4)


def _unpack_field(words: Array, field: int, bits: int) -> Array:
    """One AND per register: the fp16 subnormals of one fragment, [32 lanes, 4 registers, 2]."""
    half = 16 // bits // 2
    source = words if field < half else words >> np.uint32(8)
    mask = np.uint32(((2**bits - 1) << (bits * (field % half))) * 0x00010001)
    return np.ascontiguousarray(source & mask).view(np.float16).reshape(32, 4, 2)


def _matrix_a(registers: Array) -> Array:
    a = np.zeros((16, 16))
    for r in range(4):
        for e in range(2):
            a[G + 8 * (r % 2), 2 * T + e + 8 * (r // 2)] = registers[:, r, e]
    return a


def _fragment_b(b: Array) -> Array:
    """Registers [32 lanes, 2, 2] of a [16, 8] operand."""
    registers = np.zeros((32, 2, 2), b.dtype)
    for r in range(2):
        for e in range(2):
            registers[:, r, e] = b[2 * T + e + 8 * r, G]
    return registers


def _matrix_b(registers: Array) -> Array:
    b = np.zeros((16, 8))
    for r in range(2):
        for e in range(2):
            b[2 * T + e + 8 * r, G] = registers[:, r, e]
    return b


CASES = [
    pytest.param(
        *((group, dim) if side == "k" else (dim, group)), bits, id=f"{side}{bits}-g{group}-d{dim}"
    )
    for dim, group, bits, side in itertools.product((64, 128, 256), (64, 128), (2, 4), "kv")
]


@pytest.mark.parametrize(("rows", "cols", "bits"), CASES)
def test_unpacked_registers_multiply_to_the_integer_product(
    rows: int, cols: int, bits: int
) -> None:
    rng = np.random.default_rng(rows + cols + bits)
    codes = rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8)
    # integers as B keep every product exact, so the comparison below has no tolerance
    b = rng.integers(-8, 9, (cols, 8)).astype(np.float16)
    chunks = _codes_in_lanes(codes, bits)
    fields, row_blocks, col_blocks = 16 // bits, rows // 16, cols // 16
    fields_m = min(fields, row_blocks)
    fields_k = fields // fields_m
    assert len(chunks) == rows * cols * bits // 4096

    out = np.zeros((row_blocks, 16, 8))
    for n, words in enumerate(chunks):
        block, step = divmod(n, col_blocks // fields_k)
        for field in range(fields):
            mt = block * fields_m + field % fields_m
            ks = step * fields_k + field // fields_m
            registers = _unpack_field(words, field, bits)
            fragment = _fragment_b(b[16 * ks : 16 * ks + 16])
            out[mt] += _matrix_a(registers) @ _matrix_b(fragment)
    # the factor depends on the row block only
    shift = bits * (np.arange(row_blocks) % (fields // 2))
    out *= 2.0 ** (24 - shift)[:, None, None]
    assert (out.reshape(rows, 8) == codes.astype(float) @ b.astype(float)).all()


@pytest.mark.parametrize("length", [64, 128, 256])
def test_one_load_of_a_k_vector_holds_the_pairs_of_two_k_steps(length: int) -> None:
    stored = np.argsort(k_order(np.arange(length)))
    assert sorted(k_order(np.arange(length))) == list(range(length))
    for j, t in itertools.product(range(length // 32), range(4)):
        want = [
            16 * (2 * j + step) + 8 * half + 2 * t + e
            for step in range(2) for half in range(2) for e in range(2)
        ]  # fmt: skip
        assert stored[32 * j + 8 * t : 32 * j + 8 * t + 8].tolist() == want


@pytest.mark.parametrize("length", [64, 128, 256])
def test_one_load_of_an_m_vector_holds_the_rows_of_four_row_blocks(length: int) -> None:
    stored = np.argsort(m_order(np.arange(length)))
    assert sorted(m_order(np.arange(length))) == list(range(length))
    for j, g in itertools.product(range(length // 64), range(8)):
        want = [16 * (4 * j + block) + 8 * half + g for block in range(4) for half in range(2)]
        assert stored[64 * j + 8 * g : 64 * j + 8 * g + 8].tolist() == want


def test_movmatrix_turns_scores_into_the_operand_of_the_second_product() -> None:
    scores = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float16)  # [token, head]

    def transposed(half: Array) -> Array:
        """`movmatrix.trans`: lane L holds columns 2t and 2t + 1 of row g, in and out."""
        lanes = np.stack((half[G, 2 * T], half[G, 2 * T + 1]), 1)
        block = np.zeros((8, 8), half.dtype)
        block[G, 2 * T], block[G, 2 * T + 1] = lanes[:, 0], lanes[:, 1]
        return np.stack((block.T[G, 2 * T], block.T[G, 2 * T + 1]), 1)

    moved = np.stack((transposed(scores[:8]), transposed(scores[8:])), 1)
    assert (moved == _fragment_b(scores)).all()
