"""One token for each row through a whole decoder, in few operations per layer: what decoding on one rank repeats.

At a few rows a layer's time is that of reading its weights, and of calling it: megatron-core's modules cost about as
much as the products of a small model. Here the same weights go through the same formulas (``models.attention``,
``models.latent_attention``, ``models.swiglu``, ``models.norms``) without modules between them: norm, one product for
query, key and value, one turn of the rotary parts, attention over the cache, one product that adds to the residual, and
so on. The modules stay the reference; tests compare the two.

Matrices are laid out by input (:func:`lay_out_for_decoding`): MKL's product of few rows with a matrix is about one and
a half times as fast there as with the usual layout, by output.

Legend: b rows, h hidden, np heads, ng key/value heads, g = np / ng, hn head dim, c latent rank, d rotary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from gptoughts.models.attention import SelfAttention
from gptoughts.models.core_attention import attend_heads
from gptoughts.models.kv_cache import CacheWindow, KVCache, LayerCache
from gptoughts.models.latent_attention import MLASelfAttention
from gptoughts.models.moe import MixtureOfExperts
from gptoughts.models.norms import RMSNorm

_LINEARS = (ColumnParallelLinear, RowParallelLinear)


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the matrices of linear layers by input; shapes and values stay, and all modules work as before."""
    for name, module in model.named_modules():
        # The projection of latents is read as one matrix per head.
        if isinstance(module, _LINEARS) and not name.endswith("linear_kv_up_proj"):
            weight = module.weight
            if weight is not None and weight.device.type == "cpu":
                weight.data = weight.data.t().contiguous().t()


class DecodeStep:
    """See this module's head.

    Args:
        model: A ``LanguageModel`` on one rank, in evaluation mode, of which :func:`is_decodable` is true.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [_Layer(layer) for layer in model.decoder.layers]

    def states(self, tokens: Sequence[int], starts: Sequence[int], cache: KVCache) -> Tensor:
        """States after the final norm, [b, h], of one token at position ``starts[row]`` in each of the first rows."""
        model = self.model
        window = CacheWindow.looking_back(cache, starts, 1)
        cos, sin = model.rotary_table(cache.places, window.positions)[:, 0]  # [b, 1, d / 2] each
        turn = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        ids = torch.tensor(tokens, device=cache.device)
        x = F.embedding(ids, model.embedding.word_embeddings.weight)
        for layer, kept in zip(self.layers, window.layers(), strict=False):
            x = layer.forward(x, kept, turn)
        return _norm(x, model.decoder.final_layernorm)

    def logits(self, states: Tensor) -> Tensor:
        """[b, h] to [b, whole vocabulary]."""
        model = self.model
        is_tied = model.share_embeddings_and_output_weights
        return F.linear(states, model.shared_embedding_or_output_weight() if is_tied else model.output_layer.weight)


class _Layer:
    """One layer; both halves add to the residual [b, h]."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        attention = layer.self_attention
        self.attend = _LatentStep(attention) if isinstance(attention, MLASelfAttention) else _HeadsStep(attention)
        self.output = attention.linear_proj.weight.t()

    def forward(self, x: Tensor, kept: LayerCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        layer, mlp = self.layer, self.layer.mlp
        x = torch.addmm(x, self.attend.forward(_norm(x, layer.input_layernorm), kept, turn), self.output)
        normed = _norm(x, layer.pre_mlp_layernorm)
        if isinstance(mlp, MixtureOfExperts):
            return x + _mixture(normed, mlp)
        return torch.addmm(x, _swiglu(F.linear(normed, mlp.linear_fc1.weight)), mlp.linear_fc2.weight.t())


class _HeadsStep:
    """Multi-head and grouped-query attention up to the output projection."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.groups = attention.num_query_groups_per_partition
        self.per_group = attention.num_attention_heads_per_partition // self.groups
        self.scale = attention.hidden_size_per_attention_head**-0.5

    def forward(self, x: Tensor, kept: LayerCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[b, h] to [b, np * hn]."""
        attention, b, g = self.attention, x.size(0), self.per_group
        mixed = F.linear(x, attention.linear_qkv.weight, attention.linear_qkv.bias).view(b, self.groups, g + 2, -1)
        query, key = mixed[:, :, :g], mixed[:, :, g : g + 1]
        if not isinstance(attention.q_layernorm, IdentityOp):
            query, key = _norm(query, attention.q_layernorm), _norm(key, attention.k_layernorm)
            turned = _turn(torch.cat((query, key), dim=2), turn)
        else:
            turned = _turn(mixed[:, :, : g + 1], turn)
        keys, values = kept.store(turned[None, :, :, g], mixed[None, :, :, g + 1])
        mask = kept.window.is_visible
        found = attend_heads(turned[:, :, :g], keys, values, mask=mask, is_causal=False, scale=self.scale)
        return found.reshape(b, -1)


class _LatentStep:
    """Latent attention, absorbed, up to the output projection."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        config = attention.config
        self.rank, self.head_dim = config.kv_lora_rank, config.qk_head_dim
        heads = attention.num_attention_heads_per_partition
        weight = attention.linear_kv_up_proj.weight.view(heads, -1, self.rank)
        self.key_up, value_up = weight.split([self.head_dim, config.v_head_dim], dim=1)
        self.value_up = value_up.transpose(1, 2)
        self.heads = heads

    def forward(self, x: Tensor, kept: LayerCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[b, h] to [b, np * v_head_dim]."""
        attention, b = self.attention, x.size(0)
        if attention.config.q_lora_rank is None:
            query = F.linear(x, attention.linear_q_proj.weight)
        else:
            latent = F.linear(x, attention.linear_q_down_proj.weight)
            query = F.linear(_norm(latent, attention.q_layernorm), attention.linear_q_up_proj.weight)
        heads = query.view(b, self.heads, -1)
        combined = F.linear(x, attention.linear_kv_down_proj.weight)
        latent = _norm(combined[:, : self.rank], attention.kv_layernorm)
        # The shared key is turned as one more head.
        rotary = torch.cat((heads[..., self.head_dim :], combined[:, None, self.rank :]), dim=1)
        turned = _turn(rotary[:, None], turn)[:, 0]
        (seen,) = kept.store(torch.cat((latent, turned[:, -1]), dim=-1)[None, :, None])
        absorbed = torch.bmm(heads[..., : self.head_dim].transpose(0, 1), self.key_up).transpose(0, 1)
        query = torch.cat((absorbed, turned[:, :-1]), dim=-1)[:, None]
        mask = kept.window.is_visible
        found = attend_heads(query, seen, seen, mask=mask, is_causal=False, scale=attention.softmax_scale)
        values = torch.bmm(found[:, 0, :, : self.rank].transpose(0, 1), self.value_up)
        return values.transpose(0, 1).reshape(b, -1)


def is_decodable(model: Any) -> bool:
    """Whether :class:`DecodeStep` knows all of a model's modules: its own or megatron-core's, whole on this rank."""
    if model.config.tensor_model_parallel_size > 1 or model.config.expert_model_parallel_size > 1:
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


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _turn(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [b, n, m, d] by ([cos | cos], [-sin | sin]), each [b, 1, d]."""
    cos, sin = turn
    swapped = torch.roll(heads, heads.size(-1) // 2, dims=-1)
    return torch.mul(heads, cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))


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
