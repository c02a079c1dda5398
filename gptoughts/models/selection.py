"""The output layer at selected positions: which are this context-parallel rank's; rows that are whole already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptoughts.objectives.masked_diffusion import select_positions
from gptoughts.parallel import groups


def own_selection(selected: Tensor, shape: Sequence[int], own_part: Callable[[Tensor], Tensor]) -> Tensor:
    """Indices into this rank's part of [b, s], from int64 [n] into the whole; padded anew to a round number.

    A part in which nothing is selected gets padding alone, so that every rank runs the output layer. With more than one
    rank the host waits for the device here, since the number of positions decides on shapes.

    Args:
        selected: int64 [n].
        shape: (b, s).
        own_part: Of [b, s].

    Collective: none.
    """
    if groups.context_parallel_size() == 1:
        return selected
    is_selected = torch.zeros(shape, dtype=torch.bool, device=selected.device)
    is_selected.view(-1)[selected] = True
    return select_positions(own_part(is_selected))


@contextmanager
def given_whole_sequence(layer: Any) -> Iterator[None]:
    """Inside, a column-parallel layer does not gather its input, although sequence parallelism is on."""
    before = layer.sequence_parallel
    layer.sequence_parallel = False
    try:
        yield
    finally:
        layer.sequence_parallel = before
