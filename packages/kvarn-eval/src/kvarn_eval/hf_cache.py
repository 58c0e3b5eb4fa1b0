"""A KVarN cache for models of Hugging Face transformers, on a CPU or a GPU::

    cache = KVarNCache(model.config, "kvarn_k4v2_g128")
    model.generate(**inputs, past_key_values=cache)

It keeps what the served cache keeps: records of tiles that are no longer recent, and exactly the
first rows and the last one to two tiles. The model gets keys and values decoded, so every call
decodes all records again: memory is saved, time is not. A call with many tokens reads what its
first token finds, and its own rows exactly; to see the cache as generation does, feed a prompt in
pieces of one tile (``prefill_chunk_size`` of ``generate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvarn_core import Preset, Recipe, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.rotation import exact_rows, rotate, to_fp16

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class KVarNCache(Cache):  # type: ignore[misc]
    """Cache of a decoder-only model with full attention in every layer.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model; says layers and head dimension.
    preset : str
        Name of a preset, for example ``kvarn_k4v2_g128``.
    recipe : Recipe
        How tiles are encoded.

    Raises
    ------
    NotImplementedError
        If a layer of the model has no full attention.
    ValueError
        If the preset does not exist or the head dimension is not supported.
    """

    def __init__(
        self, config: Any, preset: str = "kvarn_k4v2_g128", recipe: Recipe = Recipe.KVARN
    ) -> None:
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if not getattr(text, "layer_types", None):  # transformers then looks at these
            for name in ("sliding_window", "attention_chunk_size"):
                if getattr(text, name, None) is not None:
                    kinds = {name}
        if other := kinds - {"full_attention"}:
            raise NotImplementedError(
                f"Layers of type {min(other)} are not supported. Choose a model with full "
                "attention in every layer."
            )
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layout = RecordLayout(Preset.from_name(preset), head_dim)
        layers = [KVarNLayer(layout, recipe) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds: records and exact rows of all layers."""
        return sum(layer.nbytes for layer in self.layers)


class KVarNLayer(DynamicLayer):  # type: ignore[misc]
    """Records and exact rows of one layer; rows are rotated, all tensors begin with [B, Hkv].

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    recipe : Recipe
        How tiles are encoded.
    """

    is_croppable = False

    def __init__(self, layout: RecordLayout, recipe: Recipe) -> None:
        super().__init__()
        self.is_initialized = False  # releases before 4.57 do not set it
        self.layout = layout
        self.recipe = recipe
        self.records: Tensor | None = None  # [B, Hkv, tiles, record_bytes]
        self.sink: list[Tensor] = []  # K and V [B, Hkv, S0, D], once there are records

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the batch, heads, dtype and device of the first rows."""
        batch, heads, _, dim = key_states.shape
        if dim != self.layout.head_dim:
            raise ValueError(
                f"Rows have {dim} channels; the cache was made for {self.layout.head_dim}."
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = exact_rows(key_states[:, :, :0], self.layout)
        self.values = self.keys.clone()
        self.records = torch.empty(
            batch, heads, 0, self.layout.record_bytes, dtype=torch.uint8, device=self.device
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new rows and return all rows as their first query reads them.

        Parameters
        ----------
        key_states, value_states : Tensor [B, Hkv, T, D], any floating dtype
            New rows: keys after RoPE, values.

        Returns
        -------
        key, value : Tensor [B, Hkv, N, D], dtype of the new rows
            Of all N tokens so far, in the basis of the model.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (exact_rows(rows, self.layout) for rows in (key_states, value_states))
        self.keys, self.values = (
            torch.cat(pair, 2) for pair in zip((self.keys, self.values), new, strict=True)
        )
        seen = self._decoded()
        self._seal()
        return seen

    def get_seq_length(self, *args: Any) -> int:
        """Tokens stored."""
        if self.records is None:
            return 0
        return int(self.records.shape[2] * self.layout.group + self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of records and exact rows."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def reset(self) -> None:
        """Forget everything."""
        self.records, self.sink = None, []
        super().reset()
        self.is_initialized = False

    def crop(self, *args: Any) -> None:
        """Refused: a record cannot lose tokens."""
        raise NotImplementedError(
            "A KVarN cache cannot be cropped. Use a generation mode that never takes tokens back."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i of the batch continue what row ``beam_idx[i]`` began."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._select(lambda x: x[indices, ...])

    def _tensors(self) -> list[Tensor]:
        return [] if self.records is None else [self.records, self.keys, self.values, *self.sink]

    def _select(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.records is not None:
            self.records, self.keys, self.values, *self.sink = map(choose, self._tensors())

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """All rows [B, Hkv, N, D]: sink, records behind it, exact rows."""
        assert self.records is not None
        recent = [self.keys, self.values]
        if self.records.shape[2]:
            tiles = dequantize(self.records.flatten(0, 2), self.layout)
            packed = [x.reshape(*self.records.shape[:2], -1, x.shape[-1]) for x in tiles]
            recent = [
                torch.cat((sink.float(), rows[:, :, sink.shape[2] :], tail.float()), 2)
                for sink, rows, tail in zip(self.sink, packed, recent, strict=True)
            ]
        key, value = (self._as_model(rotate(rows)) for rows in recent)
        return key, value

    def _as_model(self, rows: Tensor) -> Tensor:
        return to_fp16(rows) if self.dtype == torch.float16 else rows.to(self.dtype)

    def _seal(self) -> None:
        """Encode the tiles that the next query reads as records."""
        assert self.records is not None
        group, done = self.layout.group, self.records.shape[2]
        due = self.layout.packed_tiles(self.get_seq_length()) - done
        if due <= 0:
            return
        rows = [x[:, :, : due * group] for x in (self.keys, self.values)]
        if not done:
            self.sink = [x[:, :, : self.layout.sink_rows].clone() for x in rows]
        key, value = (x.reshape(-1, group, x.shape[-1]) for x in rows)
        records = quantize(key, value, self.layout, self.recipe)
        fresh = records.view(*self.records.shape[:2], due, -1)
        self.records = torch.cat((self.records, fresh), 2)
        self.keys, self.values = (x[:, :, due * group :].clone() for x in (self.keys, self.values))
