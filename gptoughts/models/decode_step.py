"""One token for each row through a whole decoder, in few operations per layer: what decoding repeats.

At a few rows a layer's time is that of reading its weights, and of calling it: megatron-core's modules cost about as
much as the products of a small model. Here the same weights go through the same formulas (``models.attention``,
``models.latent_attention``, ``models.swiglu``, ``models.norms``) without modules between them: norm, one product for
query, key and value, one turn of the rotary parts, attention over the cache, one product that adds to the residual, and
so on. The modules stay the reference; tests compare the two.

Matrices are laid out by input (:func:`lay_out_for_decoding`): MKL's product of few rows with a matrix is about one and
a half times as fast there as with the usual layout, by output.

Legend: b rows, h hidden, np heads on this rank, ng key/value heads on this rank, g = np / ng, hn head dim, c latent
rank, d rotary size, p places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from gptoughts.models.attention import SelfAttention
from gptoughts.models.kv_cache import KVCache, StepMemory, step_memory
from gptoughts.models.latent_attention import MLASelfAttention
from gptoughts.models.moe import MixtureOfExperts
from gptoughts.models.norms import RMSNorm
from gptoughts.parallel import groups
from gptoughts.platform import huge_pages

_LINEARS = (ColumnParallelLinear, RowParallelLinear)


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the matrices of linear layers by input; shapes and values stay, and all modules work as before."""
    for name, module in model.named_modules():
        # The projection of latents is read as one matrix per head.
        if isinstance(module, _LINEARS) and not name.endswith("linear_kv_up_proj"):
            weight = module.weight
            if weight is not None and weight.device.type == "cpu" and not weight.t().is_contiguous():
                by_input = huge_pages.empty(weight.t().shape, weight.dtype)
                weight.data = by_input.copy_(weight.detach().t()).t()


class DecodeStep:
    """See this module's head.

    Args:
        model: A ``LanguageModel`` in evaluation mode, of which :func:`is_decodable` is true; its weights, as they are
            laid out now, are what counts.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [_Layer(layer) for layer in model.decoder.layers]
        self.final_norm = _Norm(model.decoder.final_layernorm)
        is_tied = model.share_embeddings_and_output_weights
        self.output = model.shared_embedding_or_output_weight() if is_tied else model.output_layer.weight
        self._turns: tuple[Tensor, Tensor] | None = None

    def states(self, tokens: Sequence[int], starts: Sequence[int], cache: KVCache) -> Tensor:
        """States after the final norm, [b, h], of one token at position ``starts[row]`` in each of the first rows.

        Collective: tensor-parallel group.
        """
        memory = step_memory(cache, starts)
        turn = self._turn(cache.places, starts, cache.device)
        x = self._embed(torch.tensor(tokens, device=cache.device))
        for layer, kept in zip(self.layers, memory, strict=False):
            x = layer.forward(x, kept, turn)
        return self.final_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """[b, h] to [b, whole vocabulary]. Collective: tensor-parallel group."""
        logits = F.linear(states, self.output)
        return gather_from_tensor_model_parallel_region(logits) if groups.tensor_parallel_size() > 1 else logits

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings = self.model.embedding.word_embeddings
        return embeddings(ids) if groups.tensor_parallel_size() > 1 else F.embedding(ids, embeddings.weight)

    def _turn(self, places: int, starts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """([cos | cos], [-sin | sin]) at the rows' positions, each [b or 1, 1, 1, d]."""
        if self._turns is None or self._turns[0].size(0) < places:
            cos, sin = self.model.rotary_table(places, None)  # [places, 1, 1, d / 2] each
            self._turns = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        cos, sin = self._turns
        if min(starts) == max(starts):
            return cos.narrow(0, starts[0], 1), sin.narrow(0, starts[0], 1)
        positions = torch.tensor(starts, device=device)
        return cos[positions], sin[positions]


class _Layer:
    """One layer; both halves add to the residual [b, h]."""

    def __init__(self, layer: Any) -> None:
        attention, self.mlp = layer.self_attention, layer.mlp
        self.attend = _LatentStep(attention) if isinstance(attention, MLASelfAttention) else _HeadsStep(attention)
        self.input_norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        self.output = attention.linear_proj.weight.t()
        self.is_mixture = isinstance(self.mlp, MixtureOfExperts)
        if not self.is_mixture:
            self.gate_up, self.down = self.mlp.linear_fc1.weight, self.mlp.linear_fc2.weight.t()

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = _add_product(x, self.attend.forward(self.input_norm(x), kept, turn), self.output)
        normed = self.mlp_norm(x)
        if self.is_mixture:
            return x + _mixture(normed, self.mlp)
        return _add_product(x, _swiglu(F.linear(normed, self.gate_up)), self.down)


class _HeadsStep:
    """Multi-head and grouped-query attention up to the output projection."""

    def __init__(self, attention: Any) -> None:
        self.groups = attention.num_query_groups_per_partition
        self.per_group = attention.num_attention_heads_per_partition // self.groups
        self.scale = attention.hidden_size_per_attention_head**-0.5
        self.weight, self.bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        has_norms = not isinstance(attention.q_layernorm, IdentityOp) and attention.q_layernorm is not None
        self.norms = (_Norm(attention.q_layernorm), _Norm(attention.k_layernorm)) if has_norms else None

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[b, h] to [b, np * hn]."""
        b, g = x.size(0), self.per_group
        mixed = F.linear(x, self.weight, self.bias).view(b, self.groups, g + 2, -1)
        heads = mixed.narrow(2, 0, g + 1)
        if self.norms is not None:
            parts = heads.split((g, 1), dim=2)
            heads = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=2)
        turned = _turn(heads, turn)
        keys, values = kept.store(turned.select(2, g), mixed.select(2, g + 1))
        return _attend(turned.narrow(2, 0, g), keys, values, kept, self.scale).reshape(b, -1)


class _LatentStep:
    """Latent attention, absorbed, up to the output projection."""

    def __init__(self, attention: Any) -> None:
        config = attention.config
        self.rank, self.head_dim, self.rotary_dim = (
            config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim
        )  # fmt: skip
        self.heads, self.scale = attention.num_attention_heads_per_partition, attention.softmax_scale
        weight = attention.linear_kv_up_proj.weight.view(self.heads, -1, self.rank)
        self.key_up, value_up = weight.split([self.head_dim, config.v_head_dim], dim=1)
        self.value_up = value_up.transpose(1, 2)
        self.latent_down, self.latent_norm = attention.linear_kv_down_proj.weight, _Norm(attention.kv_layernorm)
        self.query_rank = config.q_lora_rank
        if self.query_rank is None:
            self.query_up = attention.linear_q_proj.weight
        else:
            self.query_up = attention.linear_q_up_proj.weight
            self.query_down, self.query_norm = attention.linear_q_down_proj.weight, _Norm(attention.q_layernorm)

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[b, h] to [b, np * v_head_dim]."""
        b = x.size(0)
        query = x if self.query_rank is None else self.query_norm(_latent(x, self.query_down, self.query_rank))
        heads = F.linear(query, self.query_up).view(b, self.heads, -1)
        latent, shared = _latent(x, self.latent_down, self.rank + self.rotary_dim).split(
            (self.rank, self.rotary_dim), dim=-1
        )
        plain, rotary = heads.split((self.head_dim, self.rotary_dim), dim=-1)
        # The shared key is turned as one more head.
        turned = _turn(torch.cat((rotary, shared.unsqueeze(1)), dim=1).unsqueeze(1), turn).squeeze(1)
        (seen,) = kept.store(torch.cat((self.latent_norm(latent), turned.select(1, self.heads)), dim=-1).unsqueeze(1))
        absorbed = torch.bmm(plain.transpose(0, 1), self.key_up).transpose(0, 1)
        query = torch.cat((absorbed, turned.narrow(1, 0, self.heads)), dim=-1).unsqueeze(1)
        # Values with the rotary columns still on: so the kernel for equal widths runs, and nothing is copied.
        found = _attend(query, seen, seen, kept, self.scale).reshape(b, self.heads, -1).narrow(-1, 0, self.rank)
        return torch.bmm(found.transpose(0, 1), self.value_up).transpose(0, 1).reshape(b, -1)


def is_decodable(model: Any) -> bool:
    """Whether :class:`DecodeStep` knows all of a model's modules: its own or megatron-core's, experts whole."""
    if model.config.expert_model_parallel_size > 1 or model.config.sequence_parallel:
        return False
    is_divided = model.config.tensor_model_parallel_size > 1
    if is_divided and any(isinstance(layer.mlp, MixtureOfExperts) for layer in model.decoder.layers):
        return False
    return isinstance(model.decoder.final_layernorm, RMSNorm) and all(map(_is_known, model.decoder.layers))


def _is_known(layer: Any) -> bool:
    attention, mlp = layer.self_attention, layer.mlp
    linears = [module for module in layer.modules() if hasattr(module, "weight") and module.weight is not None]
    if getattr(attention, "linear_qkv", None) is not None:
        linears.remove(attention.linear_qkv)
    return (
        isinstance(attention, SelfAttention | MLASelfAttention)
        and isinstance(mlp, MLP | MixtureOfExperts)
        and isinstance(layer.input_layernorm, RMSNorm)
        and isinstance(attention.linear_proj, RowParallelLinear)
        and not any(getattr(module, "bias", None) is not None for module in linears)
    )


class _Norm:
    """RMSNorm as y = x (w sqrt(n)) / hypot(|x|, sqrt(n eps)), n its width: four operations in place of nine."""

    def __init__(self, norm: Any) -> None:
        self.norm, width = norm, norm.weight.numel()
        self.weight = norm.weight.detach().float() * width**0.5
        self.floor = torch.tensor((width * norm.eps) ** 0.5, device=self.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # one kernel there
            return F.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.mul(x, self.weight).div_(torch.hypot(length, self.floor)).to(x.dtype)


def _add_product(x: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """x + rows matrix, where ranks hold parts of the sum. Collective: tensor-parallel group."""
    if groups.tensor_parallel_size() == 1:
        return torch.addmm(x, rows, matrix)
    part = torch.mm(rows, matrix)
    dist.all_reduce(part, group=groups.tensor_parallel_group())
    return part.add_(x)


def _latent(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """[b, width] of a down projection, which ranks may have divided. Collective: tensor-parallel group, then."""
    latent = F.linear(x, weight)
    return latent if latent.size(-1) == width else gather_from_tensor_model_parallel_region(latent)


def _attend(query: Tensor, keys: Tensor, values: Tensor, kept: StepMemory, scale: float) -> Tensor:
    """[b, ng, g, hn] over [b, ng, p, hn]; returns the heads in the same order, [b, n, np / n, hn].

    torch's CPU kernel gives each thread heads of keys: where all queries have one, it is shown to several threads.
    """
    b, ng, g, _ = query.shape
    parts = torch.get_num_threads() // b if ng == 1 and query.device.type == "cpu" else 1
    if parts > 1 and g % parts == 0:
        query = query.view(b, parts, g // parts, -1)
        keys, values = keys.expand(-1, parts, -1, -1), values.expand(-1, parts, -1, -1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=kept.is_visible, scale=scale)


def _turn(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [b, n, m, d] by ([cos | cos], [-sin | sin]), each [b or 1, 1, 1, d]."""
    cos, sin = turn
    swapped = torch.roll(heads, heads.size(-1) // 2, dims=-1)
    return torch.mul(heads, cos).addcmul_(swapped, sin)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _mixture(x: Tensor, mixture: MixtureOfExperts) -> Tensor:
    """The experts that were chosen, and no others: [b, h] to [b, h]."""
    gates, chosen = mixture.router(x[None])
    experts = mixture.experts
    output = torch.zeros_like(x) if mixture.shared_experts is None else mixture.shared_experts(x[None])[0][0]
    by_expert: dict[int, list[tuple[int, int]]] = {}
    for row, choices in enumerate(chosen.tolist()):
        for choice, expert in enumerate(choices):
            by_expert.setdefault(expert, []).append((row, choice))
    for expert, pairs in by_expert.items():
        rows, choices = (torch.tensor(part, device=x.device) for part in zip(*pairs, strict=True))
        middle = _swiglu(F.linear(x[rows], experts.linear_fc1_weight[expert]))
        middle.mul_(gates[rows, choices].to(x.dtype).unsqueeze(-1))
        output.index_add_(0, rows, F.linear(middle, experts.linear_fc2_weight[expert]))
    return output
