"""A plain torch Qwen3: the small model's forward pass, in training and in judging caches.

Parameter names are those of Hugging Face's `Qwen3ForCausalLM`, so weights need no translation.
Attention is a hook: whoever passes one sees each layer's queries, keys and values exactly as a KV
cache would (after norms and RoPE) and may answer from any other storage. A growing cache is one
such hook. Speed beyond `torch.compile` is traded away.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvarn_eval.small_model import tokenizer

if TYPE_CHECKING:
    from pathlib import Path

Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""`attention(layer, q, k, v, scale)`; q and result `[..., Hq, T, D]`, k and v `[..., Hkv, T, D]`"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen3 model; field names are those of `config.json`."""

    vocab_size: int = 192
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 8192
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse shapes that the forward pass cannot compute."""
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_attention_heads} query heads, {self.num_key_value_heads} KV heads and "
                f"head_dim {self.head_dim} do not fit. Use a multiple of the KV heads and an even "
                "head_dim."
            )
        if self.vocab_size < len(tokenizer.TOKENS):
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small. Use at least {len(tokenizer.TOKENS)}."
            )

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `config.json` in `folder`; ValueError unless it describes a tied Qwen3 model."""
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if data.get("architectures") != ["Qwen3ForCausalLM"] or not data.get("tie_word_embeddings"):
            raise ValueError(
                f"{folder} is not a Qwen3ForCausalLM with tied embeddings. Choose the small model."
            )
        data["rope_theta"] = data["rope_parameters"]["rope_theta"]
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        shape = dataclasses.asdict(self)
        rope_theta = shape.pop("rope_theta")
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **shape,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "rope_theta": rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "dtype": "float16",
            "pad_token_id": tokenizer.PAD,
            "eos_token_id": tokenizer.EOS,
        }


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., size]`; same dtype out."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split-form RoPE: channel i of `x` `[..., T, D]` turns with i + D/2; cos, sin `[T, D/2]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention; the last query sees the last key.

    Parameters
    ----------
    q : Tensor [..., Hq, Tq, D]
        Queries of the last Tq positions.
    k, v : Tensor [..., Hkv, Tk, D]
        Keys and values of all Tk >= Tq positions.
    scale : float
        Factor on the scores before softmax.

    Returns
    -------
    Tensor [..., Hq, Tq, D]
    """
    tq, tk = q.shape[-2], k.shape[-2]
    mask = None
    if 1 < tq < tk:
        mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=tq == tk, scale=scale, enable_gqa=True
    )


class SelfAttention(nn.Module):
    """Grouped-query attention with QK-norm and RoPE."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention | None) -> Tensor:
        """Attend within `x` `[..., T, hidden]`; `attention` replaces causal softmax attention."""

        def heads(y: Tensor) -> Tensor:  # [..., T, H·D] → [..., T, H, D]
            return y.view(*y.shape[:-1], -1, self.head_dim)

        q = rotate(self.q_norm(heads(self.q_proj(x))).transpose(-3, -2), cos, sin)
        k = rotate(self.k_norm(heads(self.k_proj(x))).transpose(-3, -2), cos, sin)
        v = heads(self.v_proj(x)).transpose(-3, -2)
        q, k = q.to(v.dtype), k.to(v.dtype)
        scale = self.head_dim**-0.5
        if attention is None:
            out = causal_attention(q, k, v, scale)
        else:
            out = attention(self.index, q, k, v, scale)
        mixed: Tensor = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each row of `x` `[..., hidden]`."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention | None) -> Tensor:
        """Add attention and feed-forward to `x` `[..., T, hidden]`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that checkpoints use."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SmallModel(nn.Module):
    """Qwen3 with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, ids: Tensor, attention: Attention | None = None, *, start: int = 0) -> Tensor:
        """Logits of the next token at every position.

        Parameters
        ----------
        ids : Tensor [T] or [B, T], int64
            Token ids.
        attention : callable, optional
            `attention(layer, q, k, v, scale)` in place of causal attention. q is `[..., Hq, T, D]`,
            k and v are `[..., Hkv, T, D]`, after QK-norm and RoPE; the result has the shape of q.
        start : int
            Position of the first token.

        Returns
        -------
        Tensor [T, V] or [B, T, V], dtype of the weights
        """
        x = self.model.embed_tokens(ids)
        half = self.config.head_dim // 2
        exponent = torch.arange(half, device=ids.device, dtype=torch.float32) / half
        position = torch.arange(
            start, start + ids.shape[-1], device=ids.device, dtype=torch.float32
        )
        angle = position[:, None] * self.config.rope_theta**-exponent
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attention)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SmallModel:
        """Read `config.json` and `model.safetensors` in `folder`; weights are cast to `dtype`."""
        model = cls(ModelConfig.load(folder))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(device=device, dtype=dtype).eval()

    def save(self, folder: Path) -> None:
        """Write configs, tokenizer and fp16 weights to `folder`, which is created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        generation = {
            "do_sample": False,
            "eos_token_id": tokenizer.EOS,
            "pad_token_id": tokenizer.PAD,
        }
        for name, content in (
            ("config.json", self.config.to_json()),
            ("generation_config.json", generation),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_tokenizer(folder, max_length=self.config.max_position_embeddings)
        weights = {name: p.detach().to("cpu", torch.float16) for name, p in self.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class GrowingCache:
    """An attention hook that keeps the keys and values of every earlier call, unchanged."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append k and v, then attend to all rows kept for `layer`."""
        if layer in self.rows:
            old_k, old_v = self.rows[layer]
            k, v = torch.cat((old_k, k), -2), torch.cat((old_v, v), -2)
        self.rows[layer] = (k, v)
        return causal_attention(q, k, v, scale)


@torch.inference_mode()
def generate(model: SmallModel, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy continuation of prompts of equal length.

    Parameters
    ----------
    model : SmallModel
        Weights; the cache has their dtype and device.
    prompt : Tensor [B, T], int64
        Token ids.
    max_new_tokens : int
        Tokens to add; generation ends earlier once every row has ended.

    Returns
    -------
    Tensor [B, N], int64
        New tokens, N <= max_new_tokens; what follows a row's end token means nothing.
    """
    cache = GrowingCache()
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    block, start, new = prompt, 0, []
    for _ in range(max_new_tokens):
        token = model(block, cache, start=start)[:, -1].argmax(-1)
        new.append(token)
        ended |= token == tokenizer.EOS
        if ended.all():
            break
        start += block.shape[1]
        block = token[:, None]
    return torch.stack(new, 1)
