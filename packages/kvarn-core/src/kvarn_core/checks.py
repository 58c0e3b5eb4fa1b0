"""What every op asks of the cache and of the lists of requests; messages name the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def check_cache(cache: torch.Tensor, layout: RecordLayout) -> None:
    """Raise ValueError unless `cache` has the shape and dtype of pages of records."""
    if cache.dim() != 3 or cache.shape[2] != layout.record_bytes or cache.dtype != torch.uint8:
        raise ValueError(
            f"cache has dtype {cache.dtype} and shape {tuple(cache.shape)}. "
            f"Pass uint8 [P, Hkv, {layout.record_bytes}] for {layout.preset.name}."
        )


def check_requests(
    batch: int, layout: RecordLayout, page_table: torch.Tensor, **lists: torch.Tensor | None
) -> None:
    """Raise ValueError unless `page_table` and `lists` are int32 and cover `batch` requests.

    Prefix sums, whose names begin with ``cu_``, have one entry more.
    """
    for name, values in (("page_table", page_table), *lists.items()):
        least = batch + name.startswith("cu_")
        if values is not None and (values.dtype != torch.int32 or len(values) < least):
            raise ValueError(
                f"{name} has dtype {values.dtype} and {len(values)} rows. "
                f"Pass int32 and {least} rows for {batch} requests."
            )
    if page_table.shape[1] < layout.header_columns:
        raise ValueError(
            f"page_table has {page_table.shape[1]} columns. "
            f"{layout.preset.name} needs {layout.header_columns} for the header alone."
        )


def check_dense(page_table: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless rows of `page_table` and all of `tensors` are contiguous."""
    for name, tensor in (("page_table", page_table[:1]), *tensors.items()):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}. Pass it contiguous.")
