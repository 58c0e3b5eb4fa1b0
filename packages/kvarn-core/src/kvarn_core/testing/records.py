"""What two encoders may differ in: the order of their sums and their reciprocals, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvarn_core.ops.quantize import reference
from kvarn_core.spec import Recipe
from kvarn_core.testing import naive

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

    Array = np.ndarray[Any, Any]

HALVES = {"key": (0, 3), "value": (4, 5)}  # codes and column factors among `naive.fields`
MOST_UNITS = 20  # 1 % of a factor
UNIT = 2.0**-10  # of fp16, relative, at most


def sizes(layout: RecordLayout) -> dict[str, int]:
    """Arguments by which the naive version knows a layout."""
    preset = layout.preset
    return {
        "group": layout.group, "dim": layout.head_dim,
        "key_bits": preset.key_bits, "value_bits": preset.value_bits,
    }  # fmt: skip


def assert_equivalent_records(
    got: torch.Tensor,
    want: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
) -> None:
    """Check that records of two encoders are equally good and almost everywhere equal.

    Of the codes 99.8 % are equal, and where factors are equal they differ by at most 1. Column
    factors of recipe `kvarn` are within 1 unit in the last place of fp16 for 90 % and 1 % for the
    others, where a code on the edge fell to the other side before the last refit. If such a code is
    worth more, the factor is that far off, within 1 %. Factors of `paper` are within 2 units
    always, up to a common factor, because it may stop at an equally good pass. The squared error of
    each tile is the same within 0.1 %, or 0.2 % if a factor is more than 1 unit off: rows that have
    their extremes in its column get other ranges.

    Parameters
    ----------
    got, want : Tensor [N, layout.record_bytes], uint8
        Records of the encoder under test and of the reference.
    key, value : Tensor [N, G, D], fp16
        The tiles that both encoded.
    layout : RecordLayout
        Byte layout of the preset.
    recipe : Recipe
        How both filled the records.

    Raises
    ------
    AssertionError
        Names the half and what differs.
    """
    records = [[naive.fields(r.cpu().numpy(), **sizes(layout)) for r in x] for x in (got, want)]
    decoded = [[naive.decode(r.cpu().numpy(), **sizes(layout)) for r in x] for x in (got, want)]
    for half, (name, (codes, factor)) in enumerate(HALVES.items()):
        steps, ulps, beyond = [], [], []
        tiles = (key.mT if name == "key" else value).float().cpu()  # [N, R, C]
        bits = (layout.preset.key_bits, layout.preset.value_bits)[half]
        for i, (mine, theirs) in enumerate(zip(*records, strict=True)):
            ulps.append(_ulps(mine[factor], theirs[factor], recipe))
            beyond.append(ulps[-1])
            if recipe is Recipe.KVARN and ulps[-1].max() > MOST_UNITS:
                moves = edge_moves(tiles[i : i + 1], bits, recipe, is_value=half == 1)
                moved = theirs[factor] * (1 + moves)
                beyond[-1] = _ulps(mine[factor], moved, recipe).min(0)
            steps.append(np.abs(mine[codes] - theirs[codes]))  # [G, D]
            equal = ulps[-1] == 0
            worst = (steps[-1][equal] if name == "key" else steps[-1][:, equal]).max(initial=0)
            assert worst <= 1, f"{name}: a code differs by {worst} where factors are equal"
        allowed, share, most = (1, 0.9, MOST_UNITS) if recipe is Recipe.KVARN else (2, 1.0, 2)
        _assert_share(name, "factors", np.stack(ulps), allowed, share)
        assert np.max(beyond) <= most, f"{name}: a factor differs by {np.max(beyond)} units"
        _assert_share(name, "codes", np.stack(steps), 0, 0.998)
        for i, tile in enumerate((key, value)[half].cpu().numpy()):
            errors = [float(np.square(x[i][half] - tile).sum()) for x in decoded]
            part = 2e-3 if ulps[i].max() > 1 else 1e-3
            # what is lost by rounding a scale to fp16 is an error as well, if the only one
            slack = part * errors[1] + 2.0**-22 * float(np.square(tile.astype(np.float64)).sum())
            assert abs(errors[0] - errors[1]) <= slack, f"{name} {i}: squared errors {errors}"


def edge_moves(tile: torch.Tensor, bits: int, recipe: Recipe, *, is_value: bool) -> Array:
    """Relative change of column factors if one code falls to the other side of its edge.

    A code is on an edge if one unit of fp16 in its scale, its zero and its factor can move it over,
    or one other code of its row that falls to the other side while a range is fitted.

    Parameters
    ----------
    tile : Tensor [1, R, C], fp32
        Rows have a scale and a zero, columns a factor.
    bits : int
        Bits of a code.
    recipe : Recipe
        How the record is filled.
    is_value : bool
        Whether it is a tile of values.

    Returns
    -------
    Array [R, C]
        What the code is worth to the last refit of its column; 0 if it is not on an edge.
    """
    factor = reference.column_factors(tile, bits, recipe, is_value=is_value)
    factor = reference.stored_factor(factor)
    for _ in range(recipe.factor_refits):
        y = tile / factor.float()[:, None, :]
        codes, scale, zero = reference.choose_codes(y, bits, recipe)
        decoded = reference.decoded_rows(codes, scale, zero)
        factor = reference.refit_factor(y, decoded, factor)
    step, zero = scale.float()[:, :, None], zero.float()[:, :, None]
    place = (y - zero) / step
    reach = UNIT * (zero.abs() + codes * step + y.abs()) / step
    if bits == 2 and recipe.range_refits:
        reach = reach + (codes - 1.5).abs() / tile.shape[2]
    edges = ((place - place.floor() - 0.5).abs() < reach) & (place > 0) & (place < 2**bits - 1)
    step = torch.where(place > codes, step, -step)
    product, energy = (y * decoded).sum(1, True), decoded.square().sum(1, True)
    other = (product + y * step) / (energy + 2 * decoded * step + step.square())
    moved: Array = torch.where(edges, other * energy / product - 1, 0.0)[0].numpy()
    return moved


def _ulps(mine: Array, theirs: Array, recipe: Recipe) -> Array:
    """Differences of column factors in units of the last place, common factors apart.

    A power of two moves between factors and rows where rounding decides about a gauge.
    """
    ratio = float(np.median(mine / theirs))
    if recipe is Recipe.KVARN:
        ratio = 2.0 ** round(np.log2(ratio))
    units: Array = np.abs(mine / ratio - theirs) / np.spacing(theirs.astype(np.float16))
    return units.astype(float)


def _assert_share(name: str, what: str, difference: Array, allowed: int, share: float) -> None:
    found = float((difference <= allowed).mean())
    assert found >= share, f"{name}: only {found:.4%} of the {what} differ by at most {allowed}"
