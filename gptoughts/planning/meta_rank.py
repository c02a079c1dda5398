"""One rank of a layout of any world size, built by the real builder without memory and without the other ranks.

torch's "fake" backend answers every collective at once, and the meta device holds shapes alone.
"""

from __future__ import annotations

from typing import Any

from gptoughts.errors import PlatformError
from gptoughts.models.flops import stage_parameters
from gptoughts.planning.memory import divide
from gptoughts.planning.search import Plan


def check_parameters(plan: Plan) -> dict[int, int]:
    """Build the first rank of the first, a middle and the last stage; returns rank -> its parameters.

    Raises:
        PlatformError: a rank holds another number of parameters than predicted, or torch has no fake backend.
    """
    parallel = plan.config.parallel
    stages = stage_parameters(plan.config.model, parallel)
    found = {}
    for stage in sorted({0, parallel.pipeline // 2, parallel.pipeline - 1}):
        rank = stage * parallel.tensor * parallel.context * plan.data
        predicted = divide(stages[stage], plan.config, plan.data).whole
        built = count_built(plan.config, rank, plan.run.world_size)
        if built != predicted:
            raise PlatformError(f"rank {rank} (stage {stage}): {built:,} parameters are built, {predicted:,} predicted")
        found[rank] = built
    return found


def count_built(config: Any, rank: int, world_size: int) -> int:
    """Parameters of one rank of a world that is not there; no world may exist yet.

    Raises:
        PlatformError: torch has no fake backend.
    """
    import torch
    import torch.distributed as dist

    from gptoughts.models.registry import FAMILIES
    from gptoughts.parallel import groups

    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise PlatformError(f"this torch ({torch.__version__}) has no fake process group: {error}") from None
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        groups.initialize(config.parallel, seed=config.seed)
        from gptoughts.models.meta import on_meta_device
        from gptoughts.models.stages import build_stages

        chunks = build_stages(
            FAMILIES[config.model_type].load_model_builder(),
            config,
            params_dtype=torch.bfloat16,
            construction_context=on_meta_device,
        )
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    finally:
        groups.destroy()
