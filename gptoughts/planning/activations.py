"""Bytes that a forward pass keeps for its backward, counted from what each of our modules saves.

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

The last stage adds the final norm and the logits n v/t w (the loss turns them into their gradient in place). Named
apart, not here: tensors that live inside one operator, masks of samples that are cut, and what a stage keeps of what it
has sent on (``pipeline_outputs``).

Legend: s sequence, b microbatch, n = s b / c tokens, h hidden, np heads, ng key/value heads, hn head dim, dn + dr head
dim of queries and keys of MLA, dv of its values, f feed-forward width, e experts, k experts per token, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import stage_layers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig

WIDTHS: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Precision -> bytes of a weight or activation."""
_FP32, _INT64 = 4, 8


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


def layer_bytes(model: ModelConfig, index: int, batch: Microbatch) -> int:
    """What one layer keeps of one microbatch.

    Args:
        model: The shape, filled in.
        index: The layer's, from 0 over the whole model.
        batch: The microbatch.
    """
    residual = batch.own_tokens * (4 * model.hidden_size * batch.width + 2 * _FP32)
    if isinstance(model, MLAConfig):
        attention = _latent_attention(model, batch)
    else:
        assert isinstance(model, GPTConfig)
        attention = _grouped_query_attention(model, batch)
    if isinstance(model, ExpertFields) and model.has_experts(index):
        return residual + attention + _experts(model, batch)
    return residual + attention + _swiglu(batch, model.ffn_hidden_size)


def _grouped_query_attention(model: GPTConfig, batch: Microbatch) -> int:
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert groups is not None, "a resolved shape is filled in"
    assert size is not None
    kept = (3 * heads + 3 * groups) * size  # projection np + 2 ng, turned np + ng, output np
    if batch.context > 1:
        kept = (3 * heads + 2 * exchanged_groups(groups, batch)) * size  # exchanged np + 2 ng', output twice
        if batch.is_ring:
            kept = 2 * (heads + groups) * size  # turned np, keys and values 2 ng, output np
        kept += (heads + 2 * groups) * size * model.qk_layernorm  # the projection, for the norms
    inverses = (heads + groups) * _FP32 if model.qk_layernorm else 0
    # Grouped queries are no view of the projection: their norm keeps a copy.
    copied = heads * size if model.qk_layernorm and heads != groups else 0
    per_token = (kept + copied) * batch.width + heads * _FP32 + inverses
    return batch.tokens * per_token // batch.tensor


def _latent_attention(model: MLAConfig, batch: Microbatch) -> int:
    heads, wide = model.num_attention_heads, model.qk_head_dim + model.qk_pos_emb_head_dim
    narrow = model.v_head_dim
    expanded = heads * (model.qk_head_dim + narrow)
    output = heads * max(wide, narrow) + (heads * narrow if narrow < wide or batch.context > 1 else 0)
    if batch.context > 1:
        expanded = heads * narrow  # values; keys are copied with their rotary part
    if batch.is_ring:
        output = heads * narrow
    per_token = (expanded + 2 * heads * wide + output) * batch.width + heads * _FP32
    return batch.tokens * per_token // batch.tensor + _latents(model, batch)


def _latents(model: MLAConfig, batch: Microbatch) -> int:
    own, tokens, width = batch.own_tokens, batch.tokens, batch.width
    # Of keys and values: before its norm a view of the projection with the rotary part, or a part's copy.
    before = own * model.kv_lora_rank if own < tokens else tokens * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    found = (before + own * model.kv_lora_rank) * width + own * _FP32
    if model.q_lora_rank is not None:
        # A part of the sequence is a view of the gathered whole.
        found += (tokens + own) * model.q_lora_rank * width + own * _FP32
    return found


def _swiglu(batch: Microbatch, ffn_hidden_size: int) -> int:
    return batch.tokens * 3 * ffn_hidden_size * batch.width // batch.tensor


def _experts(model: ExpertFields, batch: Microbatch) -> int:
    own, tokens, width, k = batch.own_tokens, batch.tokens, batch.width, model.moe_router_topk
    pairs = tokens * k  # where the load is even
    scores = model.num_moe_experts * _FP32
    router = own * (scores + k * (_INT64 + _FP32 * model.moe_router_normalize_gates))
    router += own * _FP32 * model.moe_router_normalize_gates
    if model.moe_aux_loss_coeff > 0 and model.moe_router_score_function == "sigmoid":
        router += own * _FP32
    if model.moe_z_loss_coeff > 0:
        router += own * (scores + _FP32)
    if width < _FP32:  # the router works on fp32 copies of its input and of its weight
        router += (own + model.num_moe_experts) * model.hidden_size * _FP32
    gate_up = pairs * 2 * model.moe_ffn_hidden_size * width // batch.tensor
    gates_and_order = pairs * (_FP32 + 2 * _INT64)
    rows = 0
    if batch.expert > 1:  # rows that came from other ranks, and whose they are, twice
        rows = pairs * (model.hidden_size * width + 2 * _INT64)
    elif own < tokens:  # the gathered sequence
        rows = tokens * model.hidden_size * width
    return router + gate_up + gates_and_order + rows + _swiglu(batch, model.moe_shared_expert_intermediate_size)


def first_stage_bytes(batch: Microbatch) -> int:
    """What the embedding keeps: ids (whole), and under tensor parallelism which of them are this rank's."""
    return batch.tokens * (_INT64 * batch.context + (batch.tensor > 1))


def rotary_bytes(model: ModelConfig, batch: Microbatch) -> int:
    """cos and sin of every position, one table for all layers of a chunk."""
    return batch.tokens * model.rotary_dim() * batch.width


def last_stage_bytes(model: ModelConfig, batch: Microbatch, output_fraction: float = 1.0) -> int:
    """What the final norm, the output layer and the loss keep.

    Args:
        model: The shape.
        batch: The microbatch.
        output_fraction: Part of the positions at which the output layer runs.
    """
    own, h = batch.own_tokens, model.hidden_size
    norm = own * (h * batch.width + _FP32)
    is_selected = model.output_layer_fraction() < 1.0
    rows = round(batch.tokens * output_fraction) if is_selected else batch.tokens
    inputs = rows * (h * batch.width + _INT64) if is_selected else own * h * batch.width
    logits = rows * model.padded_vocab_size * batch.width // batch.tensor
    loss = rows * (_FP32 + _INT64 + (batch.tensor > 1)) + batch.tokens * _FP32
    return norm + inputs + logits + loss


def multi_token_bytes(model: ModelConfig, batch: Microbatch, output_fraction: float = 1.0) -> int:
    """What the depths of multi-token prediction keep, each with logits of its own."""
    if not model.mtp_depths():
        return 0
    h, own = model.hidden_size, batch.own_tokens
    # The embedding and its norm, the other norm's inverse, and [embedding ; state] ahead of their projection.
    entrance = own * (3 * h * batch.width + 2 * _FP32) + first_stage_bytes(batch)
    layer = layer_bytes(model, model.num_layers, batch)
    return model.mtp_depths() * (entrance + layer + last_stage_bytes(model, batch, output_fraction))


def forwards_in_flight(parallel: ParallelConfig, stage: int, num_microbatches: int) -> int:
    """Forwards of chunks that a stage has run when its first backward comes.

    1F1B: stage i of P at most P - i (arXiv:2104.04473, section 2.2). Interleaved: 2 (P - i - 1) + (V - 1) P + 1
    (megatron-core 0.16.1, pipeline_parallel/schedules.py:773).
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return min(num_microbatches, stages - stage)
    return min(num_microbatches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def fullest_bytes(chunk_bytes: Sequence[int], parallel: ParallelConfig, stage: int, num_microbatches: int) -> int:
    """Most that a stage keeps at any time of a step.

    Args:
        chunk_bytes: What one microbatch leaves in each of its chunks.
        parallel: The layout.
        stage: Which stage.
        num_microbatches: Of a step.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    waiting = forwards_in_flight(parallel, stage, num_microbatches)
    if chunks == 1:
        return waiting * chunk_bytes[0]

    def chunk_of(number: int) -> int:  # P microbatches through a chunk, then through the next one
        return number % (stages * chunks) // stages

    kept = most = sum(chunk_bytes[chunk_of(number)] for number in range(waiting))
    # One backward, one forward, over a whole turn of the chunks.
    for number in range(min(num_microbatches * chunks - waiting, stages * chunks)):
        kept -= chunk_bytes[chunks - 1 - chunk_of(number)]
        kept += chunk_bytes[chunk_of(waiting + number)]
        most = max(most, kept)
    return most


def stage_activation_bytes(
    config: ExperimentConfig, batch: Microbatch, stage: int, num_microbatches: int, output_fraction: float = 1.0
) -> int:
    """What a rank of a stage keeps at its fullest, over all microbatches in flight."""
    model, parallel = config.model, config.parallel
    chunks = [
        sum(layer_bytes(model, index, batch) for index in layers) + rotary_bytes(model, batch)
        for layers in stage_layers(model.num_layers, parallel)[stage]
    ]
    if stage == 0:
        chunks[0] += first_stage_bytes(batch)
    kept = fullest_bytes(chunks, parallel, stage, num_microbatches)
    if stage == parallel.pipeline - 1:
        # The loss's backward follows at once.
        kept += last_stage_bytes(model, batch, output_fraction) + multi_token_bytes(model, batch, output_fraction)
    return kept


def pipeline_output_bytes(config: ExperimentConfig, batch: Microbatch, stage: int, num_microbatches: int) -> int:
    """Outputs that a stage has sent on and keeps until their backward."""
    if stage == config.parallel.pipeline - 1 and config.parallel.virtual_pipeline == 1:
        return 0
    in_flight = forwards_in_flight(config.parallel, stage, num_microbatches)
    return in_flight * batch.own_tokens * config.model.hidden_size * batch.width
