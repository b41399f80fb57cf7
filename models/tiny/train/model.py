"""A small Llama in plain PyTorch, with parameter names as transformers has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Shape of the network."""

    vocab_size: int = 4096
    hidden_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1152
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def to_dict(self) -> dict[str, int | float]:
        """The fields by name."""
        return asdict(self)


TARGET = Config()
DRAFT = Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=512)
CONFIGS = {"target": TARGET, "draft": DRAFT}

OUTPUT_SCALE = 0.03
"""Embeddings start with unit variance, so what reads them out must start small."""

Cache = list[tuple[Tensor, Tensor]]


class Linear(nn.Linear):
    """A bias-free projection that computes in its input's precision."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every position, each half of a head sharing its angles."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), config.rope_theta**-half)
    return torch.cat((angles, angles), -1).cos().to(dtype), torch.cat((angles, angles), -1).sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to queries or keys."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


SHORT = 512
"""Up to this length plain matrix products train faster on a CPU than the fused attention."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; causal where no mask is given."""
    length = q.shape[-2]
    if mask is not None or length > SHORT or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    future = torch.full((length, length), -3e4, dtype=scores.dtype).triu(1)
    return (scores + future).softmax(-1) @ v


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None) \
            -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        group = self.heads // self.kv_heads
        out = attend(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class Mlp(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None) \
            -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, cache = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nn.Module):
    """The language model; the output head is the embedding table."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        nn.init.constant_(self.norm.weight, OUTPUT_SCALE)
        cos, sin = rope_tables(config, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states of whole, right-padded sequences."""
        x = self.embed_tokens(ids).to(self.dtype)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x, _ = layer(x, cos, sin, None, None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token."""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))

    def step(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of the last position, continuing from a cache of keys and values."""
        x = self.embed_tokens(ids).to(self.dtype)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        grown: Cache = []
        for index, layer in enumerate(self.layers):
            x, pair = layer(x, cos, sin, mask, cache[index] if cache else None)
            grown.append(pair)
        return self.logits(self.norm(x[:, -1])), grown


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_new: int, eos: int, pad: int) -> list[list[int]]:
    """Greedy continuations of a batch of prompts, without the end token."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    eye = torch.eye(width, dtype=torch.bool)
    mask = (causal & real[:, None, :] | eye)[:, None]
    logits, cache = model.step(ids, positions, mask, None)
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(max_new):
        token = logits.argmax(-1)
        for row, value in enumerate(token.tolist()):
            done[row] = done[row] or value == eos
            if not done[row]:
                out[row].append(value)
        if all(done) or real.shape[1] >= model.config.max_position_embeddings:
            break
        real = torch.cat((real, torch.ones(len(prompts), 1, dtype=torch.bool)), 1)
        positions = (positions[:, -1:] + 1).clamp(max=model.config.max_position_embeddings - 1)
        logits, cache = model.step(token[:, None], positions, real[:, None, None, :], cache)
    return out
