"""Bytes that one layer's forward keeps for its backward, and what recompute changes about that.

Korthikanti et al. (arXiv:2205.05198, section 4) count a GPT layer: s b h (34 + 5 a s / h) bytes in half precision. Ours
differ: attention keeps no scores but log-sum-exp (arXiv:2205.14135), SwiGLU and RMSNorm keep their input alone and make
the rest again, there are no dropout masks, and a parallel linear layer keeps its part of a divided sequence and gathers
it anew in backward. Per layer, with t = tensor-parallel ranks, w bytes per element, n = s b / c tokens (c =
context-parallel ranks), of which this rank holds n' = n / t of a sequence that is divided (else n' = n):

    residual stream   n' (4 h w + 8)              both norms' inputs, outputs and fp32 inverses
    attention (GQA)   n/t ((np + 2 ng) hn w       the projection, of which values are a view
                           + (np + ng) hn w       turned queries and keys
                           + np hn w + 4 np)      output and log-sum-exp
    attention (MLA)   n/t (np (dn + dv) w + 2 np (dn + dr) w + np max(dn + dr, dv) w + 4 np), np dv w more where values
                      are narrower than keys, and the latents before and after their norms
    with context      what the exchange brings in place of projection (expanded) and turned heads, and the output once
      parallelism     more, ahead of its projection: GQA n/t ((3 np + 2 ng') hn w + 4 np), ng' copies of keys and values
                      (lcm(ng / t, c) t); MLA n/t (np (2 (dn + dr) + dv) w + np max(dn + dr, dv) w + np dv w + 4 np);
                      ring: turned queries, own keys and values, output: n/t ((2 np + 2 ng) hn w + 4 np),
                      MLA n/t (2 np (dn + dr + dv) w + 4 np)
    SwiGLU            n/t 3 f w                   gate and up, and their product
    experts           n k/t 2 f w, gates and indices, and the router's fp32 scores, n' 4 e

Parts that are recomputed (``models.recompute``) keep less:

    layernorm         the norms' outputs, 2 n' h w, are not kept
    core_attn (GQA)   n/t (2 np + 2 ng) hn w      projection and output
    core_attn (MLA)   n/t np ((dn + dv) + (dn + dr) + dv) w and the latents
    mla_up_proj       neither keys nor values nor, where they have a latent, queries; with core_attn the latents before
                      their norms and the output, n/t np dv w
    mlp, moe, shared_experts    nothing

and backward has what is missing once more, a half of a layer at a time.

Legend: s sequence, b microbatch, n = s b / c tokens, h hidden, np heads, ng key/value heads, hn head dim, dn + dr head
dim of queries and keys of MLA, dv of its values, f feed-forward width, e experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig

WIDTHS: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Precision -> bytes of a weight or activation."""
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Microbatch:
    """One microbatch as a rank sees it."""

    tokens: int
    """s b / c: of this rank's part of the sequence, where context parallelism divides it."""
    tensor: int
    """Tensor-parallel ranks."""
    is_sequence_divided: bool
    expert: int
    """Expert-parallel ranks."""
    width: int
    """Bytes of an activation's element."""
    context: int = 1
    """Context-parallel ranks."""
    is_ring: bool = False
    """Whether these hand keys and values round."""

    @property
    def own_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.tensor if self.is_sequence_divided else self.tokens


def microbatch(config: ExperimentConfig) -> Microbatch:
    """The microbatch of a resolved configuration."""
    parallel = config.parallel
    precision = config.train.precision or "bf16"
    tokens = (config.block_size or config.model.seq_length) * (config.batch_size or 1)
    own = tokens // parallel.context
    is_ring = parallel.context > 1 and parallel.context_method == "ring"
    return Microbatch(
        own, parallel.tensor, parallel.sequence, parallel.expert, WIDTHS[precision], parallel.context, is_ring
    )


def exchanged_groups(num_query_groups: int, batch: Microbatch) -> int:
    """Key and value heads that context-parallel ranks send each other, over all tensor-parallel ranks."""
    return math.lcm(num_query_groups // batch.tensor, batch.context) * batch.tensor


@dataclass(frozen=True)
class Kept:
    """Bytes of a part of a layer."""

    kept: int
    """From its forward to its backward."""
    remade: int = 0
    """In its backward besides."""

    def plus(self, other: Kept) -> Kept:
        """Both beside each other."""
        return Kept(self.kept + other.kept, self.remade + other.remade)


NOTHING = Kept(0)


def layer_bytes(model: ModelConfig, index: int, batch: Microbatch) -> int:
    """What one layer keeps of one microbatch where nothing is recomputed.

    Args:
        model: The shape, filled in.
        index: The layer's, from 0 over the whole model.
        batch: The microbatch.
    """
    return layer_memory(model, index, batch, ()).kept


def layer_memory(model: ModelConfig, index: int, batch: Microbatch, modules: Collection[str]) -> Kept:
    """What one layer keeps of one microbatch, and the most that its backward makes again at one time.

    Args:
        model: The shape, filled in.
        index: The layer's, from 0 over the whole model.
        batch: The microbatch.
        modules: Parts that are recomputed.
    """
    norm_output = batch.own_tokens * model.hidden_size * batch.width
    norms = 2 * norm_output + 2 * batch.own_tokens * FP32
    remade_norm = norm_output if "layernorm" in modules else 0
    if isinstance(model, MLAConfig):
        attention = _latent_attention(model, batch, modules)
    else:
        assert isinstance(model, GPTConfig)
        attention = _grouped_query_attention(model, batch, modules)
    if isinstance(model, ExpertFields) and model.has_experts(index):
        feed_forward = _experts(model, batch, modules)
    else:
        whole = _swiglu(batch, model.ffn_hidden_size)
        feed_forward = Kept(0, whole) if "mlp" in modules else Kept(whole)
    kept = norms + 2 * (norm_output - remade_norm) + attention.kept + feed_forward.kept
    # The feed-forward half's backward comes first, and lets go of what it has.
    remade = max(feed_forward.remade + remade_norm, attention.remade + remade_norm - feed_forward.kept)
    return Kept(kept, max(0, remade))


def _grouped_query_attention(model: GPTConfig, batch: Microbatch, modules: Collection[str]) -> Kept:
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert groups is not None, "a resolved shape is filled in"
    assert size is not None
    projection, output = (heads + 2 * groups) * size, heads * size
    inside = (heads + groups) * size  # turned queries and keys
    is_projection_kept = batch.context == 1 or model.qk_layernorm
    if batch.context > 1:
        inside = (2 * heads + 2 * exchanged_groups(groups, batch)) * size  # exchanged np + 2 ng', the output once more
    if batch.is_ring:
        inside = (heads + 2 * groups) * size  # turned queries, own keys and values
    inverses = (heads + groups) * FP32 if model.qk_layernorm else 0
    # Grouped queries are no view of the projection: their norm keeps a copy.
    copied = heads * size if model.qk_layernorm and heads != groups else 0
    inside_bytes = batch.tokens * ((inside + copied) * batch.width + heads * FP32 + inverses) // batch.tensor

    def on_rank(elements: int) -> int:
        return batch.tokens * elements * batch.width // batch.tensor

    if "core_attn" in modules:
        return Kept(on_rank(projection + output), inside_bytes)
    return Kept(on_rank(projection * is_projection_kept + output) + inside_bytes)


def _latent_attention(model: MLAConfig, batch: Microbatch, modules: Collection[str]) -> Kept:
    heads, narrow = model.num_attention_heads, model.v_head_dim
    wide, width = model.qk_head_dim + model.qk_pos_emb_head_dim, batch.width
    expanded, query, output = heads * (model.qk_head_dim + narrow), heads * wide, heads * narrow
    # Of values narrower than keys the core keeps a padded output, and what it sends to other ranks; what follows it
    # keeps the cut or received one.
    is_copied = (narrow < wide or batch.context > 1) and not batch.is_ring
    core = heads * max(wide, narrow) * is_copied * width + heads * FP32
    # Sent to other ranks, values are copied; keys always are, with their rotary part.
    value = expanded if batch.context == 1 else heads * narrow
    before, after = _latents(model, batch)

    def on_rank(per_token: int) -> int:
        return batch.tokens * per_token // batch.tensor

    whole = on_rank((value + 2 * query + output) * width + core) + before + after
    has_core, has_projections = "core_attn" in modules, "mla_up_proj" in modules
    if not (has_core or has_projections):
        return Kept(whole)
    # The rotary part of keys that is kept is a view of all ranks' latents.
    gathered = model.kv_lora_rank + model.qk_pos_emb_head_dim if batch.own_tokens < batch.tokens else 0
    kept = batch.tokens * gathered * width + before
    if not has_core:
        query *= model.q_lora_rank is None
        kept += on_rank((query + output) * width + core) + after
        return Kept(kept, max(0, whole - kept))
    # Turned queries and keys, and what other ranks have sent.
    inside = on_rank((2 * query + (value if batch.context > 1 else 0)) * width + core)
    if has_projections:
        return Kept(kept + on_rank(output * width), inside + on_rank(expanded * width) + after)
    return Kept(kept + on_rank((expanded + query + output) * width) + after, inside)


def _latents(model: MLAConfig, batch: Microbatch) -> tuple[int, int]:
    """Of queries, keys and values: before their norms; after them, with the norms' inverses."""
    own, tokens, width = batch.own_tokens, batch.tokens, batch.width
    # Of keys and values: before its norm a view of the projection with the rotary part, or a part's copy.
    before = own * model.kv_lora_rank if own < tokens else tokens * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    after = own * (model.kv_lora_rank * width + FP32)
    if model.q_lora_rank is None:
        return before * width, after
    # A part of the sequence is a view of the gathered whole.
    return (before + tokens * model.q_lora_rank) * width, after + own * (model.q_lora_rank * width + FP32)


def _swiglu(batch: Microbatch, ffn_hidden_size: int) -> int:
    return batch.tokens * 3 * ffn_hidden_size * batch.width // batch.tensor


def _experts(model: ExpertFields, batch: Microbatch, modules: Collection[str]) -> Kept:
    own, tokens, width, k = batch.own_tokens, batch.tokens, batch.width, model.moe_router_topk
    pairs = tokens * k  # where the load is even
    scores = model.num_moe_experts * FP32
    router = own * (scores + k * (INT64 + FP32 * model.moe_router_normalize_gates))
    router += own * FP32 * model.moe_router_normalize_gates
    if model.moe_aux_loss_coeff > 0 and model.moe_router_score_function == "sigmoid":
        router += own * FP32
    if model.moe_z_loss_coeff > 0:
        router += own * (scores + FP32)
    if width < FP32:  # the router works on fp32 copies of its input and of its weight
        router += (own + model.num_moe_experts) * model.hidden_size * FP32
    gate_up = pairs * 2 * model.moe_ffn_hidden_size * width // batch.tensor
    gates_and_order = pairs * (FP32 + 2 * INT64)
    rows = 0
    if batch.expert > 1:  # rows that came from other ranks, and whose they are, twice
        rows = pairs * (model.hidden_size * width + 2 * INT64)
    elif own < tokens:  # the gathered sequence
        rows = tokens * model.hidden_size * width
    routed = router + gate_up + gates_and_order + rows
    shared = _swiglu(batch, model.moe_shared_expert_intermediate_size)
    if "moe" in modules:
        return Kept(0, routed + shared)
    return Kept(routed, shared) if "shared_experts" in modules else Kept(routed + shared)
