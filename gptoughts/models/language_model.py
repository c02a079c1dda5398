"""The language model of every decoder family: megatron-core's GPTModel with our forward, rotary tables and loss.

Legend: s sequence, b microbatch, h hidden, v vocabulary on this rank.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.construction import ConstructionContext
from gptoughts.models.context_attention import is_zigzag
from gptoughts.models.cross_entropy import cross_entropy
from gptoughts.models.decoder_layer import recompute_whole_layers
from gptoughts.models.embedding_copy import copy_of_embedding, lookup_in
from gptoughts.models.fp8 import Fp8Products, prepare_fp8, switch_on_fp8
from gptoughts.models.initialization import Gathered, initialize_parameters, keep_as_is
from gptoughts.models.multi_token_prediction import MultiTokenInputs, MultiTokenPrediction
from gptoughts.models.parameter_names import global_buffer_names, global_parameter_names
from gptoughts.models.rotary import rotary_table
from gptoughts.models.selection import given_whole_sequence, own_selection
from gptoughts.parallel import groups
from gptoughts.parallel.context import own_part


class LanguageModel(GPTModel):
    """A decoder with rotary positions.

    Its module ``mtp`` exists where there is multi-token prediction only: megatron-core's schedules look for it by name.

    Args:
        config: megatron-core's configuration.
        block_spec: Layers of this stage and the final norm.
        vocab_size: Padded vocabulary, whole.
        seq_length: Longest sequence, in tokens.
        rotary_dim: Size of a head's rotary part.
        rotary_base: Base of its wavelengths.
        rotary_frequencies: Radians per position of each pair where they are scaled; unset: the base's.
        rotary_amplitude: What their cos and sin are multiplied by.
        share_embeddings_and_output_weights: One matrix for both ends.
        mtp_num_layers: Depths of multi-token prediction, with layers like the last of ``block_spec``.
        pre_process: This stage embeds tokens.
        post_process: This stage makes logits.
        vp_stage: Virtual pipeline stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block_spec: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        seq_length: int,
        rotary_dim: int,
        rotary_base: float,
        share_embeddings_and_output_weights: bool,
        rotary_frequencies: tuple[float, ...] | None = None,
        rotary_amplitude: float = 1.0,
        mtp_num_layers: int = 0,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec,
            vocab_size=vocab_size,
            max_sequence_length=seq_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            # Across stages our own way (parallel.shared_embedding): megatron-core's needs two parameters.
            share_embeddings_and_output_weights=share_embeddings_and_output_weights and pre_process and post_process,
            # Our attention turns its heads by models.rotary's tables, which need no module.
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        recompute_whole_layers(self.decoder)
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.rotary_frequencies = rotary_frequencies
        self.rotary_amplitude = rotary_amplitude
        self.ties_output_layer = share_embeddings_and_output_weights
        self.shares_embedding = bool(share_embeddings_and_output_weights or mtp_num_layers) and (
            pre_process != post_process
        )
        self.embedding_copy: Tensor | None = None
        if self.shares_embedding and post_process:
            self.embedding_copy = copy_of_embedding(config, vocab_size)
            if mtp_num_layers:
                self.embedding = lookup_in(self.embedding_copy, config, vocab_size, seq_length)
            if share_embeddings_and_output_weights:
                self.output_layer.register_parameter("weight", None)
        self.mtp_num_layers = mtp_num_layers
        self.fp8: Fp8Products | None = None
        """Unset: no FP8."""
        if mtp_num_layers and post_process:
            layer, norm = block_spec.layer_specs[-1], block_spec.layer_norm
            self.mtp = MultiTokenPrediction(config, mtp_num_layers, layer, norm, vp_stage=vp_stage)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        selected_positions: Tensor | None = None,
        is_padding: Tensor | None = None,
    ) -> Tensor:
        """Loss per token, logits, or on a stage without the output layer its hidden states.

        Args:
            input_ids: int64 [b, s]; every stage, tensor- and context-parallel rank gets the whole sequence, here and in
                all other arguments.
            position_ids: int64 [b, s]; unset: 0 ... s-1.
            attention_mask: As in ``SDPACoreAttention.forward``; unset: what the layer spec says (causal or none).
            labels: int64 [b, s], already shifted where the objective shifts.
            packed_seq_params: Lengths of the sequences packed into one row (b = 1).
            selected_positions: int64 [n], distinct indices into the flattened [b, s]: the output layer runs at these
                alone; with labels the loss elsewhere reads 0.
            is_padding: bool [b, s], positions that routers of experts do not count; unset: there are none.

        Returns:
            With labels fp32 [b, s] nats, or, where a model with multi-token prediction trains, [1 + depths, b, s], the
            main model's first; without, logits [b, s, whole vocabulary], or [n, whole vocabulary] at the selected
            positions; [s, b, h] before the last stage. With context parallelism s is this rank's part in all of them
            (:meth:`own_part`).

        Collective: tensor- and context-parallel group; with FP8 the amax group.
        """
        assert input_ids is not None, "every stage gets the tokens: their shape gives the positions"
        hidden_states = self.embed(input_ids) if self.pre_process else None
        layer_inputs = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": self.rotary_table(input_ids.size(1), position_ids),
            "packed_seq_params": packed_seq_params,
        }
        hidden_states = self.decoder(
            hidden_states=hidden_states, padding_mask=self.own_positions(is_padding), **layer_inputs
        )
        if not self.post_process:
            return hidden_states
        if labels is None and selected_positions is not None:
            assert groups.context_parallel_size() == 1, "whoever generates has whole sequences"
            rows = self._selected_rows(hidden_states, selected_positions, input_ids.size(1))
            with given_whole_sequence(self.output_layer):
                return self.logits(rows).squeeze(1)
        if labels is None:
            return self.logits(hidden_states).transpose(0, 1)
        loss = self.token_loss(hidden_states, labels, selected_positions)
        if not self.mtp_num_layers or not self.training:
            return loss
        inputs = MultiTokenInputs(input_ids, labels, selected_positions, is_padding)
        return torch.stack([loss, *self.mtp.losses(self, hidden_states, inputs, layer_inputs)])

    def own_part(self, x: Tensor) -> Tensor:
        """This context-parallel rank's tokens of [b, s, ...]: [b, s/c, ...]. Collective: none."""
        return own_part(x, is_zigzag=is_zigzag(self.config))

    def embed(self, input_ids: Tensor) -> Tensor:
        """[s, b, h] of this rank's part of int64 [b, s]. Collective: tensor-parallel group."""
        return self.embedding(input_ids=self.own_part(input_ids), position_ids=None)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] to [s, b, whole vocabulary]. Collective: tensor-parallel group."""
        logits, _ = self.output_layer(hidden_states, weight=self._tied_weight())
        return gather_from_tensor_model_parallel_region(logits)

    def _tied_weight(self) -> Tensor | None:
        """The output layer's matrix where it is not its own."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.embedding_copy if self.ties_output_layer else None

    def token_loss(self, hidden_states: Tensor, labels: Tensor, selected_positions: Tensor | None) -> Tensor:
        """fp32 [b, s] of hidden states [s, b, h], this rank's part; labels and selected positions are the whole's.

        Collective: tensor-parallel group.
        """
        if selected_positions is not None:
            selected_positions = own_selection(selected_positions, labels.shape, self.own_part)
        labels = self.own_part(labels)
        if selected_positions is not None:
            return self._selected_loss(hidden_states, labels, selected_positions, self._tied_weight())
        logits, _ = self.output_layer(hidden_states, weight=self._tied_weight())
        return self.compute_language_model_loss(labels, logits)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss, fp32 [b, s], of logits [s, b, v] that nothing else may use. Collective: tensor parallel."""
        s, b, v = logits.shape
        group = groups.tensor_parallel_group() if self.config.tensor_model_parallel_size > 1 else None
        loss = cross_entropy(logits.view(s * b, v), labels.t().reshape(s * b), group)
        return loss.view(s, b).t()

    def _selected_loss(self, hidden_states: Tensor, labels: Tensor, selected: Tensor, weight: Tensor | None) -> Tensor:
        """Loss [b, s] at the selected positions and 0 elsewhere, of [s, b, h] (s this rank's part, where divided)."""
        b, s = labels.shape
        rows = self._selected_rows(hidden_states, selected, s)
        with given_whole_sequence(self.output_layer):
            logits, _ = self.output_layer(rows, weight=weight)
        loss = self.compute_language_model_loss(labels.reshape(-1)[None, selected], logits)
        return loss.new_zeros(b * s).index_copy(0, selected, loss.view(-1)).view(b, s)

    def _selected_rows(self, hidden_states: Tensor, selected: Tensor, length: int) -> Tensor:
        """[n, 1, h] at indices into the flattened [b, length], of [s, b, h] (s this rank's part, where divided)."""
        if self.config.sequence_parallel:
            # The output layer sums its input's gradient over the ranks, so each takes its own part of the whole.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        where = selected % length * hidden_states.size(1) + selected // length
        return hidden_states.flatten(0, 1).index_select(0, where).unsqueeze(1)

    def shared_embedding_weight(self) -> Tensor | None:
        """The embedding matrix of a stage that shares it with another one: the parameter, or its copy."""
        if not self.shares_embedding:
            return None
        return self.embedding.word_embeddings.weight if self.pre_process else self.embedding_copy

    def own_positions(self, is_padding: Tensor | None) -> Tensor | None:
        """This rank's part of [b, s] under context and sequence parallelism."""
        if is_padding is None:
            return None
        is_padding = self.own_part(is_padding)
        if not self.config.sequence_parallel:
            return is_padding
        return is_padding.chunk(groups.tensor_parallel_size(), dim=1)[groups.tensor_parallel_rank()]

    def rotary_table(self, length: int, position_ids: Tensor | None) -> Tensor:
        """cos and sin as the layers take them, of the given positions [b, s] below ``length``, or of all below it."""
        table = rotary_table(
            max(self.max_sequence_length, length),
            self.rotary_dim,
            self.rotary_base,
            self.config.params_dtype,
            None if position_ids is None else self.own_part(position_ids),
            frequencies=self.rotary_frequencies,
            amplitude=self.rotary_amplitude,
        )
        return self.own_part(table[:, :length]) if position_ids is None else table


def build_language_model(
    config: ExperimentConfig,
    transformer_config: TransformerConfig,
    block_spec: TransformerBlockSubmodules,
    *,
    mtp_num_layers: int = 0,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    construction_context: ConstructionContext = nullcontext,
    gathered: Gathered = keep_as_is,
) -> LanguageModel:
    """Construct inside ``construction_context``, then write the initial weights.

    Args:
        config: The run.
        transformer_config: Its model in megatron-core's terms.
        block_spec: Layers of this stage and the final norm.
        mtp_num_layers: Depths of multi-token prediction.
        pre_process: This stage embeds tokens.
        post_process: This stage makes logits.
        vp_stage: Virtual pipeline stage.
        construction_context: ``deepspeed.zero.Init`` under ZeRO-3.
        gathered: ``deepspeed.zero.GatheredParameters`` under ZeRO-3.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    model = config.model
    prepare_fp8(transformer_config, config)
    with construction_context():
        language_model = LanguageModel(
            transformer_config,
            block_spec,
            vocab_size=model.padded_vocab_size,
            seq_length=config.block_size or model.seq_length,
            rotary_dim=model.rotary_dim(),
            rotary_base=model.rotary_base,
            rotary_frequencies=model.rotary_frequencies(),
            rotary_amplitude=model.rotary_amplitude(),
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            mtp_num_layers=mtp_num_layers,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
    language_model.fp8 = switch_on_fp8(language_model, config)
    initialize_parameters(
        global_parameter_names(language_model),
        seed=config.seed,
        std=model.init_method_std,
        num_layers=model.num_layers,
        tensor_parallel_rank=groups.tensor_parallel_rank(),
        tensor_parallel_size=groups.tensor_parallel_size(),
        expert_parallel_rank=groups.expert_parallel_rank(),
        expert_parallel_size=groups.expert_parallel_size(),
        gathered=gathered,
    )
    return language_model


__all__ = [
    "LanguageModel",
    "build_language_model",
    "global_buffer_names",
    "global_parameter_names",
]
