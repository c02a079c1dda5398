"""Bytes that a stage keeps of the microbatches in flight: its layers (``layers``), its ends, and what it has sent on.

The last stage adds the final norm and the logits n v/t w (the loss turns them into their gradient in place). Of a
group of layers that is recomputed as a whole (``config.recompute``) the input alone is kept, n' h w, and backward has
all that its layers keep once more. With Transformer Engine's FP8 each layer also keeps its weights cast
(``planning.fp8``). Named apart, not here: tensors that live inside one operator, masks of samples that
are cut, and what a stage keeps of what it has sent on (``pipeline_output_bytes``).

Legend: s sequence, b microbatch, n = s b / c tokens of c context-parallel ranks, n' of them on this rank, h hidden,
v vocabulary, t tensor-parallel ranks, w bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import stage_layers
from gptoughts.config.recompute import layer_groups, recomputed_modules
from gptoughts.planning.fp8 import cast_weights
from gptoughts.planning.layers import FP32, INT64, NOTHING, Kept, Microbatch, layer_memory


def first_stage_bytes(batch: Microbatch) -> int:
    """What the embedding keeps: ids (whole), and under tensor parallelism which of them are this rank's."""
    return batch.tokens * (INT64 * batch.context + (batch.tensor > 1))


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
    norm = own * (h * batch.width + FP32)
    is_selected = model.output_layer_fraction() < 1.0
    rows = round(batch.tokens * output_fraction) if is_selected else batch.tokens
    inputs = rows * (h * batch.width + INT64) if is_selected else own * h * batch.width
    logits = rows * model.padded_vocab_size * batch.width // batch.tensor
    loss = rows * (FP32 + INT64 + (batch.tensor > 1)) + batch.tokens * FP32
    return norm + inputs + logits + loss


def depth_memory(
    model: ModelConfig, batch: Microbatch, parallel: ParallelConfig, output_fraction: float, cast: Kept = NOTHING
) -> Kept:
    """One depth of multi-token prediction, with logits of its own; ``cast``: its layer's cast weights."""
    h, own = model.hidden_size, batch.own_tokens
    # The embedding's output; both norms' inverses, and [embedding ; state] ahead of their projection.
    embedded = own * h * batch.width + first_stage_bytes(batch)
    entrance = own * (2 * h * batch.width + 2 * FP32)
    ends = embedded + last_stage_bytes(model, batch, output_fraction)
    layer = layer_memory(model, model.num_layers, batch, recomputed_modules(parallel)).plus(cast)
    if parallel.recompute_granularity == "full" and parallel.recompute_method != "block":
        return Kept(ends, entrance + layer.kept)
    return Kept(ends + entrance + layer.kept, layer.remade)


def multi_token_bytes(model: ModelConfig, batch: Microbatch, output_fraction: float = 1.0) -> int:
    """What the depths of multi-token prediction keep where nothing is recomputed."""
    return model.mtp_depths() * depth_memory(model, batch, ParallelConfig(), output_fraction).kept


def chunk_memory(
    model: ModelConfig,
    layers: Sequence[int],
    batch: Microbatch,
    parallel: ParallelConfig,
    cast: Callable[[int], Kept] = lambda _: NOTHING,
) -> Kept:
    """The layers of a chunk of one microbatch, with the rotary table; what is remade at the fullest moment.

    Args:
        model: The shape.
        layers: By their indices over the whole model.
        batch: The microbatch.
        parallel: The layout.
        cast: Cast weights of a layer (``planning.fp8``).
    """
    modules = recomputed_modules(parallel)
    groups = []
    for group in layer_groups(len(layers), parallel):
        of_layers = [
            layer_memory(model, index, batch, modules).plus(cast(index))
            for index in (layers[place] for place in group.layers)
        ]
        whole = sum(layer.kept for layer in of_layers)
        if group.is_recomputed:
            only_input = batch.own_tokens * model.hidden_size * batch.width
            groups.append(Kept(only_input, whole - only_input))
        else:
            groups.append(Kept(whole, max(layer.remade for layer in of_layers)))
    most = behind = 0
    for kept in reversed(groups):  # backward has let go of what is behind
        most = max(most, kept.remade - behind)
        behind += kept.kept
    return Kept(behind + rotary_bytes(model, batch), most)


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
    modules = recomputed_modules(parallel)

    def cast(index: int) -> Kept:
        return cast_weights(config, index, modules)

    of_chunks = [
        chunk_memory(model, layers, batch, parallel, cast) for layers in stage_layers(model.num_layers, parallel)[stage]
    ]
    chunks = [chunk.kept for chunk in of_chunks]
    if stage == 0:
        chunks[0] += first_stage_bytes(batch)
    kept = fullest_bytes(chunks, parallel, stage, num_microbatches)
    remade = max(chunk.remade for chunk in of_chunks)
    if stage < parallel.pipeline - 1:
        return kept + remade
    # The loss's backward follows at once; it is over when that of the layers begins.
    ends = last_stage_bytes(model, batch, output_fraction)
    if model.mtp_depths():
        depth = depth_memory(model, batch, parallel, output_fraction, cast(model.num_layers))
        of_last_depth = max(0, depth.remade - last_stage_bytes(model, batch, output_fraction))
        ends += model.mtp_depths() * depth.kept + of_last_depth
    return kept + max(ends, remade)


def pipeline_output_bytes(config: ExperimentConfig, batch: Microbatch, stage: int, num_microbatches: int) -> int:
    """Outputs that a stage has sent on and keeps until their backward."""
    if stage == config.parallel.pipeline - 1 and config.parallel.virtual_pipeline == 1:
        return 0
    in_flight = forwards_in_flight(config.parallel, stage, num_microbatches)
    return in_flight * batch.own_tokens * config.model.hidden_size * batch.width
