"""The embedding matrix where the last pipeline stage uses it as well: as the output layer, to look tokens up, or both.

One stage owns the parameter: the first, with its optimizer state and its place in norms and checkpoints. The last one
computes with a copy that is no parameter. In each step the copy's gradient, summed over the microbatches in fp32, is
added to what the first stage accumulates in its last backward, ahead of any hook of ZeRO's; after the update the copy
is written anew. So both are equal to the bit at every ZeRO stage, and the sum is the one that a single stage would
have. (megatron-core keeps two parameters and adds up their gradients after the last backward,
distributed/finalize_model_grads.py:164 of 0.16.1, when ZeRO 2 and 3 have divided and thrown away whole gradients.)

The order cannot block: the first stage's last backward of a step comes after all backwards of all other stages.

Legend: v vocabulary on this tensor-parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

Gathered = Callable[[Sequence[Parameter]], AbstractContextManager[object]]


class SharedEmbedding:
    """The owner's side on the first stage, the copy on the last one; others have none.

    Args:
        weight: [v, h]: on the first stage the parameter (sharded under ZeRO-3), on the last one the copy, a leaf tensor
            that wants a gradient.
        gathered: Makes a parameter whole inside the context, for reading.
    """

    def __init__(self, weight: Tensor, gathered: Gathered) -> None:
        self._group = parallel_state.get_embedding_group()
        ranks = dist.get_process_group_ranks(self._group)
        self._first, self._last = ranks[0], ranks[-1]
        self._weight = weight
        self._gathered = gathered
        self._gradient: Tensor | None = None
        self._backwards_left = 0
        if isinstance(weight, Parameter):
            self._shape = tuple(getattr(weight, "ds_shape", weight.shape))
            weight.register_hook(self._with_gradient_of_copy)
        else:
            weight.register_post_accumulate_grad_hook(self._accumulate)

    def begin_step(self, num_microbatches: int) -> None:
        """Before the first forward of a step. Collective: none."""
        self._backwards_left = num_microbatches
        self._gradient = None

    def end_schedule(self) -> None:
        """After the last backward: the copy's gradient goes to its owner. Collective: embedding group."""
        if isinstance(self._weight, Parameter):
            assert self._backwards_left == 0, f"{self._backwards_left} backwards did not reach the embedding"
        else:
            assert self._gradient is not None, "no backward reached the copy of the embedding"
            dist.broadcast(self._gradient, self._last, group=self._group)
            self._gradient = None

    def refresh(self) -> None:
        """Write the copy anew. Collective: embedding group, and the first stage's data-parallel group under ZeRO-3."""
        with torch.no_grad():
            if isinstance(self._weight, Parameter):
                with self._gathered([self._weight]):
                    dist.broadcast(self._weight.data.contiguous(), self._first, group=self._group)
            else:
                dist.broadcast(self._weight.data, self._first, group=self._group)

    def _with_gradient_of_copy(self, gradient: Tensor) -> Tensor:
        """The owner's gradient of one backward; in the step's last one with what the copy has accumulated."""
        self._backwards_left -= 1
        if self._backwards_left:
            return gradient
        theirs = torch.empty(self._shape, dtype=torch.float32, device=gradient.device)
        dist.broadcast(theirs, self._last, group=self._group)
        return theirs.add_(gradient).to(gradient.dtype)

    def _accumulate(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self._gradient is None:
            self._gradient = weight.grad.float()
        else:
            self._gradient += weight.grad
        weight.grad = None
