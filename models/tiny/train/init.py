"""A starting point that can already look back.

Learning to copy starts with a long plateau in which a young model finds two co-operating heads:
one that notes each token's predecessor, and one that looks for the place where the current token
was the predecessor and repeats what stood there. On a small budget that plateau is most of the
run, so these heads are written into the initial weights. Training leaves them alone while the
rest of the network is young, and then is free to change them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch.utils.hooks import RemovableHandle

from model import Attention, Llama

FAST, SLOW = 12, 16
"""Rotary pairs below FAST tell neighbours apart; pairs from SLOW on barely turn and match content."""


def _rows(count: int, width: int) -> Tensor:
    """Random orthonormal rows."""
    return torch.linalg.qr(torch.randn(width, count))[0].T.contiguous()


def _write_previous(attention: Attention, content: int, note: slice, angles: Tensor) -> Tensor:
    """Head 0 attends to the position before and notes what stands there; returns its reading."""
    size, half = attention.head_dim, attention.head_dim // 2
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    fast = torch.arange(FAST)
    q[:size], k[:size], v[:size] = 0, 0, 0
    k[fast, 0] = 1.0
    q[fast, 0] = angles[:FAST].cos()
    q[fast + half, 0] = -angles[:FAST].sin()
    count = note.stop - note.start
    reading = _rows(count, content - 1)
    v[:count, 1:content] = reading
    o[note, :count] = 1.5 * torch.eye(count)
    return reading


def _write_induction(attention: Attention, kv_head: int, content: int, note: slice, reading: Tensor) -> None:
    """One head finds where the current token was the one before, and repeats what stood there."""
    size, half = attention.head_dim, attention.head_dim // 2
    head = kv_head * (attention.heads // attention.kv_heads)
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    queries, keys = slice(head * size, (head + 1) * size), slice(kv_head * size, (kv_head + 1) * size)
    q[queries], k[keys], v[keys] = 0, 0, 0
    slow = torch.cat((torch.arange(SLOW, half), torch.arange(SLOW, half) + half))
    match = _rows(len(slow), reading.shape[0])
    q[head * size + slow, 1:content] = 1.7 * match @ reading
    k[kv_head * size + slow, note] = 1.7 * match
    copied = _rows(size, content - 1)
    v[keys, 1:content] = copied
    o[1:content, queries] = 2.0 * copied.T


def _hold(weight: Tensor, fixed: slice, columns: bool) -> RemovableHandle:
    """Keep some rows or columns of a weight from being trained until the handle is removed."""
    def held(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[(slice(None), fixed) if columns else fixed] = 0
        return grad

    return weight.register_hook(held)


def _hold_heads(attention: Attention, heads: list[int], kv_heads: list[int]) -> list[RemovableHandle]:
    size, handles = attention.head_dim, []
    for head in heads:
        part = slice(head * size, (head + 1) * size)
        handles += [_hold(attention.q_proj.weight, part, False), _hold(attention.o_proj.weight, part, True)]
    for head in kv_heads:
        part = slice(head * size, (head + 1) * size)
        handles += [_hold(attention.k_proj.weight, part, False), _hold(attention.v_proj.weight, part, False)]
    return handles


def look_back(model: Llama) -> list[RemovableHandle]:
    """Write a previous-token head into the first layer and induction heads into the next ones.

    A constant and the notes have their own coordinates of the residual stream. No token's
    embedding and no output may use them, or they would soon be drowned out. The heads are not
    trained until the returned handles are removed.
    """
    width, size = model.config.hidden_size, model.config.head_dim
    content = width - min(size, width // 4)
    note = slice(content, width)
    table, norm = model.embed_tokens.weight, model.norm.weight
    with torch.no_grad():
        table[:, note] = 0
        table[:, 0] = 12.0
        reading = _write_previous(model.layers[0].self_attn, content, note, model.config.rope_theta**-half(size))
        for layer in model.layers[1:3]:
            for kv_head in range(model.config.num_key_value_heads):
                _write_induction(layer.self_attn, kv_head, content, note, reading)
        norm[0] = 0
        norm[note] = 0
    used = (norm != 0).float()
    table.register_hook(lambda grad: grad * used.to(grad.device))
    norm.register_hook(lambda grad: grad * used.to(grad.device))
    handles = _hold_heads(model.layers[0].self_attn, [0], [0])
    kv_heads = list(range(model.config.num_key_value_heads))
    group = model.config.num_attention_heads // len(kv_heads)
    for layer in model.layers[1:3]:
        handles += _hold_heads(layer.self_attn, [group * head for head in kv_heads], kv_heads)
    return handles


def half(size: int) -> Tensor:
    """The exponents of the rotary frequencies."""
    return torch.arange(0, size, 2, dtype=torch.float32) / size
