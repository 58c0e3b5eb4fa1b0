"""Comparisons in the order that explains failures: special values, error, bits.

An error is judged against what plain torch loses in the same low precision, so no tolerance is
invented and none depends on the machine.
"""

from __future__ import annotations

import torch

SHOWN = 5  # coordinates listed in a message


def assert_same_specials(got: torch.Tensor, want: torch.Tensor) -> None:
    """Check that NaN, +inf and -inf stand at the same positions.

    Parameters
    ----------
    got, want : Tensor, equal shapes, any floating dtypes

    Raises
    ------
    AssertionError
        With the first coordinates that differ.
    """
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)} differ"
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(want)
        assert not differs.any(), f"{name} {_where(differs)}"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of ``got - want`` over that of `want`, in fp64; 0 / 0 is 0.

    Elements where `want` is not finite are left out.
    """
    kept = torch.isfinite(want)
    difference, scale = (got - want)[kept].double().norm(), want[kept].double().norm()
    return 0.0 if difference == 0 else float(difference / scale)


def assert_as_good_as(
    got: torch.Tensor, want: torch.Tensor, low_precision: torch.Tensor, *, factor: float = 2.0
) -> None:
    """Check that `got` is at most `factor` times as wrong as torch in low precision.

    Parameters
    ----------
    got : Tensor
        Result under test.
    want : Tensor, fp32 or fp64
        The same computed exactly.
    low_precision : Tensor
        The same computed by plain torch in the dtype of `got`.
    factor : float
        Allowed multiple.

    Raises
    ------
    AssertionError
        With both errors.
    """
    assert_same_specials(got, want)
    error, allowed = relative_error(got, want), factor * relative_error(low_precision, want)
    assert error <= allowed, f"relative error {error:.3e}, allowed {allowed:.3e}"


def assert_close(got: torch.Tensor, want: torch.Tensor, *, tolerance: float) -> None:
    """Check special values, then that the relative error is at most `tolerance`.

    Raises
    ------
    AssertionError
        With the error and the worst coordinate.
    """
    assert_same_specials(got, want)
    error = relative_error(got, want)
    if error > tolerance:
        worst = torch.unravel_index((got - want).abs().nan_to_num(0.0).argmax(), got.shape)
        at = tuple(int(i) for i in worst)
        raise AssertionError(f"relative error {error:.3e} > {tolerance:.1e}, worst at {at}")


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Check that two tensors are equal bit for bit, NaN payloads and signs of zero included.

    Raises
    ------
    AssertionError
        With the number of differing elements and the first coordinates.
    """
    assert got.dtype == want.dtype, f"dtypes {got.dtype} and {want.dtype} differ"
    assert got.shape == want.shape, f"shapes {tuple(got.shape)} and {tuple(want.shape)} differ"
    differs = _bits(got) != _bits(want)
    assert not differs.any(), f"bits {_where(differs)}"


def _bits(x: torch.Tensor) -> torch.Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(whole)


def _where(differs: torch.Tensor) -> str:
    places = [tuple(place) for place in differs.nonzero()[:SHOWN].tolist()]
    return f"differ in {int(differs.sum())} of {differs.numel()} elements, first at {places}"
