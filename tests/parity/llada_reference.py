"""The published architecture and loss of LLaDA, written plainly and on its own: nothing here is of the package.

A Llama block (Touvron et al., arXiv:2302.13971: RMSNorm before each half, rotary embeddings, SwiGLU) whose attention
has no causal mask (arXiv:2502.09992, section 2.2), latent attention as DeepSeek-V2 writes it (arXiv:2405.04434,
section 2.1, equations 9-19, with a norm on each latent), and equation 3 of the former for rows of any length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.epsilon) * self.weight


def turn(x: Tensor, base: float) -> Tensor:
    """Rotary positions of heads [b, np, s, d], pairs (i, i + d/2)."""
    half = x.size(-1) // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.size(2), dtype=torch.float64)[:, None] * rates
    spinner = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    turned = torch.complex(x[..., :half], x[..., half:]) * spinner
    return torch.cat((turned.real, turned.imag), dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, base: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.base = heads, groups, width // heads, base
        self.q = nn.Linear(width, heads * self.size, bias=bias)
        self.k = nn.Linear(width, groups * self.size, bias=bias)
        self.v = nn.Linear(width, groups * self.size, bias=bias)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = (layer(x).view(b, s, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = turn(q, self.base), turn(k, self.base)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, width))


class LatentAttention(nn.Module):
    def __init__(
        self, width: int, heads: int, base: float, epsilon: float, *, q_rank: int | None, rank: int, plain: int,
        turned: int, value: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.plain, self.turned, self.value, self.base = heads, plain, turned, value, base
        if q_rank is None:
            self.q = nn.Linear(width, heads * (plain + turned), bias=False)
        else:
            self.q_down, self.q_norm = nn.Linear(width, q_rank, bias=False), Norm(q_rank, epsilon)
            self.q_up = nn.Linear(q_rank, heads * (plain + turned), bias=False)
        self.kv_down = nn.Linear(width, rank + turned, bias=False)
        self.kv_norm = Norm(rank, epsilon)
        self.kv_up = nn.Linear(rank, heads * (plain + value), bias=False)
        self.out = nn.Linear(heads * value, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x) if hasattr(self, "q") else self.q_up(self.q_norm(self.q_down(x)))
        q_plain, q_turned = q.view(b, s, self.heads, -1).transpose(1, 2).split([self.plain, self.turned], dim=-1)
        latent, k_turned = self.kv_down(x).split([self.kv_norm.weight.numel(), self.turned], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).view(b, s, self.heads, -1).transpose(1, 2)
        k_plain, v = kv.split([self.plain, self.value], dim=-1)
        q_turned, k_turned = turn(q_turned, self.base), turn(k_turned[:, None], self.base)
        scores = q_plain @ k_plain.transpose(-1, -2) + q_turned @ k_turned.transpose(-1, -2)
        probabilities = (scores / (self.plain + self.turned) ** 0.5).softmax(-1)
        return self.out((probabilities @ v).transpose(1, 2).reshape(b, s, -1))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm, self.feed_forward_norm = Norm(width, epsilon), Norm(width, epsilon)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        normed = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Reference(nn.Module):
    def __init__(
        self, attentions: list[nn.Module], *, width: int, inner: int, vocabulary: int, epsilon: float, tied: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(attention, width, inner, epsilon) for attention in attentions)
        self.norm = Norm(width, epsilon)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, s, v] of [b, s]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def diffusion_loss(
    model: nn.Module, rows: list[Tensor], masks: list[Tensor], levels: list[float], *, mask_id: int, epsilon: float
) -> Tensor:
    """Equation 3's estimate: each row [length] on its own, as long as it is, so that nothing can leak."""
    total, positions = torch.zeros(()), 0
    for row, mask, level in zip(rows, masks, levels, strict=True):
        probability = (1 - epsilon) * level + epsilon
        logits = model(torch.where(mask, mask_id, row)[None])[0]
        losses = F.cross_entropy(logits[mask], row[mask], reduction="none") / probability
        total = total + losses.sum()
        positions += len(row)
    return total / positions
