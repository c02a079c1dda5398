"""The published architecture and loss of LLaDA, written plainly and on its own: nothing here is of the package.

A Llama block (Touvron et al., arXiv:2302.13971: RMSNorm before each half, rotary embeddings, SwiGLU) whose attention
has no causal mask (arXiv:2502.09992, section 2.2), and that paper's equation 3 for rows of any length.
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


class Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, groups: int, base: float, epsilon: float, bias: bool):
        super().__init__()
        self.heads, self.groups, self.size, self.base = heads, groups, width // heads, base
        self.attention_norm, self.feed_forward_norm = Norm(width, epsilon), Norm(width, epsilon)
        self.q = nn.Linear(width, heads * self.size, bias=bias)
        self.k = nn.Linear(width, groups * self.size, bias=bias)
        self.v = nn.Linear(width, groups * self.size, bias=bias)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).view(b, s, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = turn(q, self.base), turn(k, self.base)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, width))
        normed = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Reference(nn.Module):
    def __init__(
        self, *, layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int, base: float,
        epsilon: float, bias: bool, tied: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, inner, heads, groups, base, epsilon, bias) for _ in range(layers))
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
