"""DeepSeek with multi-token prediction and balance losses in plain torch: loops and whole matrices, nothing of ours.

Weights are taken by our global names; everything is written [b, s, ...]. Sources: DeepSeek-V2 (arXiv:2405.04434,
section 2.1) and DeepSeek-V3 (arXiv:2412.19437, sections 2.1 and 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoughts.models.deepseek.config import DeepSeekConfig


@dataclass
class Losses:
    """Sums over the microbatch; ``balance`` holds each expert layer's two losses as they are added to a mean."""

    main: Tensor = field(default_factory=lambda: torch.zeros(()))
    depths: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)


class Reference:
    """The model as functions of its weights.

    Args:
        shape: No groups of experts, no YaRN.
        weights: Global name -> tensor, routers' biases included.
    """

    def __init__(self, shape: DeepSeekConfig, weights: Mapping[str, Tensor]) -> None:
        assert shape.moe_router_num_groups == 1
        assert shape.rotary_scaling_factor == 1
        self.shape = shape
        self.weights = weights
        self.losses = Losses()
        self.length = 0
        """Positions of a whole row, which the z-loss is divided by at every depth."""

    def __call__(self, tokens: Tensor, loss_weights: Tensor) -> Losses:
        """Tokens int64 [b, s + 1], loss weights [b, s]."""
        self.losses = Losses()
        inputs, s = tokens[:, :-1], tokens.size(1) - 1
        self.length = s
        states = self.embed(inputs)
        for number in range(self.shape.num_layers):
            states = self.layer(f"decoder.layers.{number}.", states)
        states = self.norm("decoder.final_layernorm", states)
        self.losses.main = (self.cross_entropy(states, tokens[:, 1:]) * loss_weights).sum()
        for k in range(1, self.shape.mtp_num_layers + 1):
            prefix = f"mtp.layers.{k - 1}."
            # Only what the paper keeps: positions 1 ... s - k, whose targets exist.
            embedded = self.norm(f"{prefix}enorm", self.embed(tokens[:, k:s]))
            before = self.norm(f"{prefix}hnorm", states[:, : s - k])
            projected = torch.cat((embedded, before), -1) @ self.weights[f"{prefix}eh_proj.weight"].T
            states = self.layer(f"{prefix}transformer_layer.", projected)
            states = self.norm(f"{prefix}final_layernorm", states)
            of_target = loss_weights[:, k:]
            self.losses.depths.append((self.cross_entropy(states, tokens[:, 1 + k :]) * of_target).sum())
        return self.losses

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["embedding.word_embeddings.weight"][tokens]

    def norm(self, name: str, x: Tensor) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.shape.layernorm_epsilon).sqrt()
        return x / rms * self.weights[f"{name}.weight"]

    def cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        tied = not self.shape.untie_embeddings_and_output_weights
        head = self.weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
        return F.cross_entropy((states @ head.T).transpose(1, 2), targets, reduction="none")

    def layer(self, prefix: str, x: Tensor) -> Tensor:
        x = x + self.attention(f"{prefix}self_attention.", self.norm(f"{prefix}input_layernorm", x))
        normed = self.norm(f"{prefix}pre_mlp_layernorm", x)
        if f"{prefix}mlp.router.weight" in self.weights:
            return x + self.experts(f"{prefix}mlp.", normed)
        return x + self.swiglu(normed, *(self.weights[f"{prefix}mlp.linear_fc{n}.weight"] for n in (1, 2)))

    def swiglu(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        gate, up = (x @ first.T).chunk(2, -1)
        return (F.silu(gate) * up) @ second.T

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        shape, w = self.shape, {n: t for n, t in self.weights.items() if n.startswith(prefix)}
        b, s, _ = x.shape
        heads, plain, rotary = shape.num_attention_heads, shape.qk_head_dim, shape.qk_pos_emb_head_dim
        if shape.q_lora_rank is None:
            query = x @ w[f"{prefix}linear_q_proj.weight"].T
        else:
            latent = self.norm(f"{prefix}q_layernorm", x @ w[f"{prefix}linear_q_down_proj.weight"].T)
            query = latent @ w[f"{prefix}linear_q_up_proj.weight"].T
        query = query.view(b, s, heads, plain + rotary)
        down = x @ w[f"{prefix}linear_kv_down_proj.weight"].T
        latent, shared = down.split([shape.kv_lora_rank, rotary], -1)
        up = self.norm(f"{prefix}kv_layernorm", latent) @ w[f"{prefix}linear_kv_up_proj.weight"].T
        key, value = up.view(b, s, heads, plain + shape.v_head_dim).split([plain, shape.v_head_dim], -1)
        turned = self.turn(shared.unsqueeze(2)).expand(-1, -1, heads, -1)
        key = torch.cat((key, turned), -1)
        query = torch.cat((query[..., :plain], self.turn(query[..., plain:])), -1)
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) * (plain + rotary) ** -0.5
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value)
        return out.reshape(b, s, -1) @ w[f"{prefix}linear_proj.weight"].T

    def turn(self, x: Tensor) -> Tensor:
        half = x.size(-1) // 2
        frequencies = self.shape.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(x.size(1), dtype=torch.float64), frequencies)[None, :, None, :]
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def experts(self, prefix: str, x: Tensor) -> Tensor:
        shape, w = self.shape, self.weights
        k, number = shape.moe_router_topk, shape.num_moe_experts
        logits = x @ w[f"{prefix}router.weight"].T
        scores = logits.sigmoid() if shape.moe_router_score_function == "sigmoid" else logits.softmax(-1)
        biased = scores + w.get(f"{prefix}router.expert_bias", torch.zeros(number))
        chosen = torch.zeros_like(scores).scatter(-1, biased.topk(k, -1).indices, 1.0)
        gates = scores * chosen
        if shape.moe_router_normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        gates = gates * shape.moe_router_topk_scaling_factor
        out = torch.zeros_like(x)
        for e in range(number):
            first, second = (w[f"{prefix}experts.linear_fc{n}_weight"][e] for n in (1, 2))
            out = out + gates[..., e, None] * self.swiglu(x, first, second)
        if f"{prefix}shared_experts.linear_fc1.weight" in w:
            out = out + self.swiglu(x, *(w[f"{prefix}shared_experts.linear_fc{n}.weight"] for n in (1, 2)))
        self.losses.balance.append(self.balance_loss(scores, chosen))
        squares = logits.exp().sum(-1).log().square()
        self.losses.z.append(squares.sum() / (x.size(0) * self.length))
        return out

    def balance_loss(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Mean over sequences of sum_e f_e P_e (V3, equations 17 to 20; V2, equations 23 to 25)."""
        k, number = self.shape.moe_router_topk, self.shape.num_moe_experts
        losses = []
        for of_sequence, chosen_of_sequence in zip(scores, chosen, strict=True):
            counted = chosen_of_sequence
            if self.shape.moe_router_score_function == "sigmoid":
                counted = torch.zeros_like(of_sequence).scatter(-1, of_sequence.topk(k, -1).indices, 1.0)
                of_sequence = of_sequence / of_sequence.sum(-1, keepdim=True)
            length = of_sequence.size(0)
            fraction = counted.sum(0) * number / (k * length)
            losses.append((fraction * of_sequence.sum(0) / length).sum())
        return torch.stack(losses).mean()
