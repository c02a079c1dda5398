"""What DeepSpeed's JSON decides about memory and exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.planning.layers import WIDTHS

_FP32 = 4
_DEFAULT_BUCKET_ELEMENTS = 500_000_000
_DEFAULT_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed 0.19.8, runtime/zero/config.py:113 and 251."""


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's JSON says about memory and exchange."""

    stage: int
    gradient_width: int
    """Bytes of an accumulated gradient."""
    communication_width: int
    """Bytes of a gradient on its way to other ranks."""
    bucket_elements: int
    """Gradients reduced at once."""
    prefetch_elements: int
    """Weights that stage 3 fetches ahead."""
    reuse_elements: int
    """Stage 3 keeps a weight whose next use is nearer than this."""
    num_buckets: int
    """2 where reduction overlaps with backward at stage 2."""
    offloads_optimizer: bool
    """To the host's memory, or through it to a disk."""
    offloads_parameters: bool
    swaps_optimizer: bool = False
    """Of these, to a disk."""
    swaps_parameters: bool = False
    sub_group_elements: int = 0
    """Parameters of a rank whose state is in the host's memory at one time, where it is swapped."""
    num_swap_buffers: int = 0
    """Tensors of such a sub-group for which there is room."""

    @staticmethod
    def read(deepspeed: Mapping[str, Any], precision: str) -> ZeroSettings:
        """From what ``deepspeed.initialize`` would be given."""
        zero = deepspeed.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype", "fp32")
        gradient_width = WIDTHS[accumulated] if stage else _FP32
        sent = deepspeed.get("communication_data_type", precision if stage else "fp32")
        return ZeroSettings(
            stage=stage,
            gradient_width=gradient_width,
            communication_width=WIDTHS[sent],
            bucket_elements=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET_ELEMENTS)),
            prefetch_elements=int(zero.get("stage3_prefetch_bucket_size", 0)),
            reuse_elements=int(zero.get("stage3_max_reuse_distance", _DEFAULT_REUSE_ELEMENTS)),
            num_buckets=2 if stage == 2 and zero.get("overlap_comm") else 1,
            offloads_optimizer=_device(zero, "offload_optimizer") != "none",
            offloads_parameters=_device(zero, "offload_param") != "none",
            swaps_optimizer=_device(zero, "offload_optimizer") == "nvme",
            swaps_parameters=_device(zero, "offload_param") == "nvme",
            sub_group_elements=int(zero.get("sub_group_size", 0)),
            num_swap_buffers=int((zero.get("offload_optimizer") or {}).get("buffer_count", 0)),
        )


def _device(zero: Mapping[str, Any], block: str) -> str:
    return str((zero.get(block) or {}).get("device", "none"))
