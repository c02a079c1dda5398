"""The feed-forward half of a layer as a mixture of experts: shared experts for all tokens, routed ones by choice.

With tensor parallelism each expert's width is divided, as a dense layer's is, and the ranks' parts of the output are
summed; under sequence parallelism tokens are gathered before and scattered with the sum. Router and gates are computed
where the tokens are, so that the router's gradient is a part (summed with the other sequence-parallel ones) or whole.

With expert parallelism a rank holds some of the experts whole (or its part of their width), and tokens travel between
ranks of different samples: ``models.token_dispatch``.

Legend: s sequence on this rank, b microbatch, h hidden, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptoughts.models.grouped_experts import GroupedExperts, assign
from gptoughts.models.recompute import recomputes, run_again
from gptoughts.models.router import ExpertRouter
from gptoughts.models.token_dispatch import DISPATCHERS


class MixtureOfExperts(BaseMoELayer):
    """megatron-core's expert layer with a forward of ours.

    Its own dispatches tokens through masks of [tokens, experts] and refuses tensor parallelism without sequence
    parallelism (transformer/moe/moe_layer.py:379, 0.16.1); here tokens are sorted, and both are exact.

    Args:
        config: megatron-core's configuration.
        router: Makes the router from (config, process groups).
        shared_experts: Makes the shared experts from (config, tensor-parallel group); unset: there are none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        router: Callable[[TransformerConfig, Any], ExpertRouter],
        shared_experts: Callable[[TransformerConfig, Any], nn.Module] | None,
    ) -> None:
        groups = get_default_pg_collection()
        super().__init__(config=config, pg_collection=groups)
        self.router: ExpertRouter = router(config, groups)
        self.experts = GroupedExperts(
            config, self.num_local_experts, groups.tp.size(), self.ep_group.size(), self.ep_group.rank()
        )
        self.shared_experts = shared_experts(config, groups.tp) if shared_experts is not None else None

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, **upstream_options: Any
    ) -> tuple[Tensor, None]:
        """[s, b, h] to [s, b, h] and no bias; padding (bool [b, s]) does not count in the experts' balance.

        Collective: tensor- and expert-parallel group.
        """
        given = sorted(name for name, value in upstream_options.items() if value is not None)
        if given:
            raise ValueError(f"the expert layer was given {', '.join(given)}; not supported")
        if self.training and recomputes(self.config, "moe"):
            return run_again(self.config, lambda x: self._all_experts(x, padding_mask), hidden_states), None
        return self._all_experts(hidden_states, padding_mask), None

    def _all_experts(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        gates, chosen = self.router(hidden_states, padding_mask)
        output = self._routed(hidden_states, gates, chosen)
        return output if self.shared_experts is None else output + self._shared(hidden_states)

    def _shared(self, hidden_states: Tensor) -> Tensor:
        shared = self.shared_experts
        assert shared is not None
        if self.training and recomputes(self.config, "shared_experts"):
            return run_again(self.config, lambda x: shared(x)[0], hidden_states)
        return shared(hidden_states)[0]

    def _routed(self, hidden_states: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        _, b, h = hidden_states.shape
        group = self.attn_tp_group
        is_divided = group.size() > 1
        is_sequence_divided = is_divided and self.config.sequence_parallel
        if is_sequence_divided:
            # Every rank's part of each expert gives a part of these gradients: sum them on the way back.
            hidden_states, gates = (
                gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
                for x in (hidden_states, gates)
            )
            chosen = gather_from_sequence_parallel_region(chosen, group=group)
        elif is_divided:
            hidden_states, gates = (
                copy_to_tensor_model_parallel_region(x, group=group) for x in (hidden_states, gates)
            )
        tokens = hidden_states.reshape(-1, h)
        if self.ep_group.size() == 1:
            output = self.experts(tokens, gates, assign(chosen, self.config.num_moe_experts))
        else:
            dispatch = DISPATCHERS[self.config.moe_token_dispatcher_type]
            output = dispatch(tokens, gates, chosen, self.experts, self.num_local_experts, self.ep_group)
        output = output.view(-1, b, h)
        if is_sequence_divided:
            return reduce_scatter_to_sequence_parallel_region(output, group=group)
        return reduce_from_tensor_model_parallel_region(output, group=group) if is_divided else output
