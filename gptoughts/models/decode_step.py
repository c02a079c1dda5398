"""A few tokens of each row through a whole decoder, in few operations per layer: what sampling repeats.

At a few rows a layer's time is that of reading its weights, and of calling it: megatron-core's modules cost about as
much as the products of a small model. Here the same weights go through the same formulas (``models.attention``,
``models.latent_attention``, ``models.swiglu``, ``models.norms``) without modules between them: norm, one product for
query, key and value, one turn of the rotary parts, attention over the cache, one product that adds to the residual, and
so on. The modules stay the reference; tests compare the two.

Dense models in fp32 on a CPU go through all layers in one call (``models.native_decode``) where there is a C++
compiler. For others, where one token of each row is decoded, matrices are laid out by input (``lay_out_for_decoding``),
which suits MKL's products of few rows; a window of a masked-diffusion model has enough tokens for the usual layout.

Legend: b rows, s tokens of each, n = b s, h hidden, np heads on this rank, ng key/value heads there, g = np / ng,
hn head dim, c latent rank, d rotary size, p places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from gptoughts.models.attention import SelfAttention
from gptoughts.models.decode_operations import (
    Norm,
    add_product,
    attend,
    latent_of,
    mixture_of,
    product,
    swiglu_of,
    turned_by,
)
from gptoughts.models.kv_cache import CacheWindow, KVCache, StepMemory
from gptoughts.models.latent_attention import MLASelfAttention
from gptoughts.models.moe import MixtureOfExperts
from gptoughts.models.native_decode import MOST_ROWS, native_decoder
from gptoughts.models.norms import RMSNorm
from gptoughts.parallel import groups


class DecodeStep:
    """See this module's head.

    Args:
        model: A ``LanguageModel`` in evaluation mode, of which :func:`is_decodable` is true; its weights, as they are
            now, are what counts.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [_Layer(layer) for layer in model.decoder.layers]
        self.final_norm = Norm(model.decoder.final_layernorm)
        is_tied = model.share_embeddings_and_output_weights
        self.output = model.shared_embedding_or_output_weight() if is_tied else model.output_layer.weight
        self.native = native_decoder(model, self.output)
        """Stands for the layers below where it knows them all and a window is small."""
        self._turns: tuple[Tensor, Tensor] | None = None

    def suits(self, count: int) -> bool:
        """Whether windows of ``count`` tokens cost less here than through the modules."""
        return count == 1 or all(layer.suits(count) for layer in self.layers)

    def states(self, tokens: Sequence[int], starts: Sequence[int], cache: KVCache) -> Tensor:
        """States after the final norm, [b, h], of one token at position ``starts[row]`` in each of the first rows.

        Collective: tensor-parallel group.
        """
        window = CacheWindow.looking_back(cache, starts, 1)
        return self.window_states(torch.tensor(tokens, device=cache.device), window)

    def window_states(self, ids: Tensor, window: CacheWindow) -> Tensor:
        """States after the final norm, [n, h], of a window's tokens int64 [n], row after row.

        Collective: tensor-parallel group.
        """
        assert not window.is_causal, "whole prompts are the modules'"
        turn = self._turn(window)
        x = self._embed(ids)
        if self.native is not None and ids.numel() <= MOST_ROWS:
            return self.native.states(x, window, *(part.view(-1, part.size(-4), part.size(-1)) for part in turn))
        for layer, kept in zip(self.layers, window.memory(), strict=False):
            x = layer.forward(x, kept, turn)
        return self.final_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """[n, h] to [n, whole vocabulary]. Collective: tensor-parallel group."""
        if self.native is not None and states.size(0) <= MOST_ROWS:
            return self.native.logits(states)
        logits = product(states, self.output)
        return gather_from_tensor_model_parallel_region(logits) if groups.tensor_parallel_size() > 1 else logits

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings = self.model.embedding.word_embeddings
        return embeddings(ids) if groups.tensor_parallel_size() > 1 else F.embedding(ids, embeddings.weight)

    def _turn(self, window: CacheWindow) -> tuple[Tensor, Tensor]:
        """([cos | cos], [-sin | sin]) at the window's positions, each [b, s, 1, 1, d] or [s, 1, 1, d]."""
        places = window.cache.places
        if self._turns is None or self._turns[0].size(0) < places:
            cos, sin = self.model.rotary_table(places, None)  # [places, 1, 1, d / 2] each
            self._turns = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        cos, sin = self._turns
        if window.start is None:
            return cos[window.positions], sin[window.positions]
        count = window.positions.size(1)
        return cos.narrow(0, window.start, count), sin.narrow(0, window.start, count)


class _Layer:
    """One layer; both halves add to the residual [n, h]."""

    def __init__(self, layer: Any) -> None:
        attention, self.mlp = layer.self_attention, layer.mlp
        self.attend = _LatentStep(attention) if isinstance(attention, MLASelfAttention) else _HeadsStep(attention)
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.pre_mlp_layernorm)
        self.output = attention.linear_proj.weight
        self.is_mixture = isinstance(self.mlp, MixtureOfExperts)
        if not self.is_mixture:
            self.gate_up, self.down = self.mlp.linear_fc1.weight, self.mlp.linear_fc2.weight

    def suits(self, count: int) -> bool:
        return not self.is_mixture and self.attend.suits(count)

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = add_product(x, self.attend.forward(self.input_norm(x), kept, turn), self.output)
        normed = self.mlp_norm(x)
        if self.is_mixture:
            return x + mixture_of(normed, self.mlp)
        return add_product(x, swiglu_of(product(normed, self.gate_up)), self.down)


class _HeadsStep:
    """Multi-head and grouped-query attention up to the output projection."""

    def __init__(self, attention: Any) -> None:
        self.groups = attention.num_query_groups_per_partition
        self.per_group = attention.num_attention_heads_per_partition // self.groups
        self.scale = attention.hidden_size_per_attention_head**-0.5
        self.weight, self.bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        has_norms = not isinstance(attention.q_layernorm, IdentityOp) and attention.q_layernorm is not None
        self.norms = (Norm(attention.q_layernorm), Norm(attention.k_layernorm)) if has_norms else None

    def suits(self, count: int) -> bool:
        return True

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[n, h] to [n, np * hn]."""
        (b, s), g = kept.layer.window.positions.shape, self.per_group
        mixed = product(x, self.weight)
        if self.bias is not None:
            mixed += self.bias
        mixed = mixed.view(b, s, self.groups, g + 2, -1)
        heads = mixed.narrow(3, 0, g + 1)
        if self.norms is not None:
            parts = heads.split((g, 1), dim=3)
            heads = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=3)
        turned = turned_by(heads, turn)
        keys, values = kept.store(turned.select(3, g), mixed.select(3, g + 1))
        # All queries of a group are rows of one product.
        rows = turned.narrow(3, 0, g).transpose(1, 2).flatten(2, 3)
        found = attend(rows, keys, values, kept, self.scale)
        return found.reshape(b, self.groups, s, g, -1).transpose(1, 2).reshape(b * s, -1)


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
        self.latent_down, self.latent_norm = attention.linear_kv_down_proj.weight, Norm(attention.kv_layernorm)
        self.query_rank, self.is_absorbed = config.q_lora_rank, attention.is_absorbed
        if self.query_rank is None:
            self.query_up = attention.linear_q_proj.weight
        else:
            self.query_up = attention.linear_q_up_proj.weight
            self.query_down, self.query_norm = attention.linear_q_down_proj.weight, Norm(attention.q_layernorm)

    def suits(self, count: int) -> bool:
        return self.is_absorbed(count)

    def forward(self, x: Tensor, kept: StepMemory, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[n, h] to [n, np * v_head_dim]."""
        b, s = kept.layer.window.positions.shape
        query = x if self.query_rank is None else self.query_norm(latent_of(x, self.query_down, self.query_rank))
        heads = product(query, self.query_up).view(b * s, self.heads, -1)
        latent, shared = latent_of(x, self.latent_down, self.rank + self.rotary_dim).split(
            (self.rank, self.rotary_dim), dim=-1
        )
        plain, rotary = heads.split((self.head_dim, self.rotary_dim), dim=-1)
        # The shared key is turned as one more head.
        together = torch.cat((rotary, shared.unsqueeze(1)), dim=1)
        turned = turned_by(together.view(b, s, 1, self.heads + 1, -1), turn).view(b * s, self.heads + 1, -1)
        (seen,) = kept.store(
            torch.cat((self.latent_norm(latent), turned.select(1, self.heads)), dim=-1).view(b, s, 1, -1)
        )
        absorbed = torch.bmm(plain.transpose(0, 1), self.key_up).transpose(0, 1)
        query = torch.cat((absorbed, turned.narrow(1, 0, self.heads)), dim=-1).view(b, 1, s * self.heads, -1)
        # Values with the rotary columns still on: so the kernel for equal widths runs, and nothing is copied.
        found = attend(query, seen, seen, kept, self.scale).reshape(b * s, self.heads, -1).narrow(-1, 0, self.rank)
        return torch.bmm(found.transpose(0, 1), self.value_up).transpose(0, 1).reshape(b * s, -1)


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
