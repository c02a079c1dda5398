"""Where offload puts a rank's state, and the host's memory through which it goes to a disk."""

from __future__ import annotations

from gptoughts.planning.zero import ZeroSettings

_FP32 = 4


def places(zero: ZeroSettings) -> dict[str, str]:
    """Whether weights, gradients and optimizer state are on the device, in the host's memory or on a disk.

    Stage 1 keeps whole gradients on the device; from stage 2 on each rank's part goes where the optimizer is, or into
    the host's memory where that is on a disk.
    """
    optimizer = "disk" if zero.swaps_optimizer else "host" if zero.offloads_optimizer else "device"
    return {
        "parameters": "disk" if zero.swaps_parameters else "host" if zero.offloads_parameters else "device",
        "gradients": "host" if zero.offloads_optimizer and zero.stage >= 2 else "device",
        "optimizer": optimizer,
    }


def swap_buffer_bytes(zero: ZeroSettings, width: int, *, part: float, tensor_part: float, gathered_part: float) -> int:
    """The host's memory through which state goes to the disk and comes from it; 0 without such offload.

    A sub-group ends with the tensor that fills it, so that it is larger by up to one. Of weights there are this rank's
    parts of all that is gathered, and one sub-group on its way out.

    Args:
        zero: DeepSpeed's settings.
        width: Bytes of a weight.
        part: Parameters of a rank.
        tensor_part: Of the largest tensor.
        gathered_part: Of the weights that are gathered at one time.
    """
    sub_group = min(part, zero.sub_group_elements + tensor_part)
    found = zero.num_swap_buffers * _FP32 * sub_group if zero.swaps_optimizer else 0.0
    if zero.swaps_parameters:
        found += width * (sub_group + gathered_part)
    return int(found)
