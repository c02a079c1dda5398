"""This rank's chunks of the model: one, or with interleaved stages several, and what concerns all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.language_model import LanguageModel
from gptoughts.models.parameter_names import global_buffer_names, global_module_names, global_parameter_names
from gptoughts.parallel import groups


def build_stages(
    build_model: Callable[..., LanguageModel], config: ExperimentConfig, **options: Any
) -> list[LanguageModel]:
    """The chunks that this rank holds, in the order of the model.

    Args:
        build_model: The family's builder.
        config: The run; its groups exist.
        options: Passed on to every call of the builder.

    Collective: tensor-parallel group; the data-parallel group under ZeRO-3.
    """
    rank, size, chunks = (
        groups.pipeline_parallel_rank(),
        groups.pipeline_parallel_size(),
        config.parallel.virtual_pipeline,
    )
    return [
        build_model(
            config,
            pre_process=rank == 0 and chunk == 0,
            post_process=rank == size - 1 and chunk == chunks - 1,
            vp_stage=chunk if chunks > 1 else None,
            **options,
        )
        for chunk in range(chunks)
    ]


def stage_parameters(chunks: Sequence[LanguageModel]) -> dict[str, Parameter]:
    """This rank's parameters by global name."""
    return _merged([global_parameter_names(chunk) for chunk in chunks])


def stage_buffers(chunks: Sequence[LanguageModel]) -> dict[str, Tensor]:
    """This rank's buffers that belong in a checkpoint, by global name."""
    return _merged([global_buffer_names(chunk) for chunk in chunks])


def stage_modules(chunks: Sequence[LanguageModel]) -> list[dict[str, Module]]:
    """For each chunk: its modules by global name."""
    return [global_module_names(chunk) for chunk in chunks]


def stage_depths(chunks: Sequence[LanguageModel]) -> list[int]:
    """For each chunk: its place among all chunks of the model, from the embedding."""
    return [i * groups.pipeline_parallel_size() + groups.pipeline_parallel_rank() for i in range(len(chunks))]


def shared_embedding_weight(chunks: Sequence[LanguageModel]) -> Tensor | None:
    """The embedding matrix on this rank where two stages use it (``parallel.shared_embedding``), else None."""
    found = [weight for chunk in chunks if (weight := chunk.shared_embedding_weight()) is not None]
    return found[0] if found else None


def all_names(names: Sequence[str]) -> list[str]:
    """The names of all stages, from each stage's own. Collective: pipeline-parallel group."""
    everyone: list[Any] = [None] * groups.pipeline_parallel_size()
    dist.all_gather_object(everyone, list(names), group=groups.pipeline_parallel_group())
    return [name for of_stage in everyone for name in of_stage]


def _merged(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in tables:
        doubled = merged.keys() & table.keys()
        assert not doubled, f"two chunks claim {sorted(doubled)}"
        merged |= table
    return merged
