"""Accelerators by name: memory, rate of half-precision matrix products, and links, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One device and its links; rates are per device and direction, in 10^9 bytes per second."""

    memory_gib: float
    peak_tflops: float
    """Dense bf16 products with fp32 sums."""
    intra_node_gb_per_second: float
    """To devices of the same node."""
    inter_node_gb_per_second: float
    """To other nodes: a figure of the network, not of the device."""
    source: str


_DGX_100 = "8 x 200 Gb/s per node of 8 (DGX A100 data sheet)"
_DGX_400 = "8 x 400 Gb/s per node of 8 (DGX H100 and B200 data sheets)"
_CARD = "no NVLink; a network of 100 Gb/s per device is assumed"

ACCELERATORS: Mapping[str, Accelerator] = {
    "a100": Accelerator(80, 312, 300, 25, f"NVIDIA A100 data sheet (80 GB SXM: NVLink 600 GB/s both ways); {_DGX_100}"),
    "h100": Accelerator(80, 989, 450, 50, f"NVIDIA H100 data sheet (SXM: NVLink 900 GB/s both ways); {_DGX_400}"),
    "h200": Accelerator(141, 989, 450, 50, f"NVIDIA H200 data sheet (SXM: NVLink 900 GB/s both ways); {_DGX_400}"),
    "b200": Accelerator(180, 2250, 900, 50, f"NVIDIA DGX B200 data sheet (NVLink 1.8 TB/s both ways); {_DGX_400}"),
    "rtx4090": Accelerator(
        24, 165.2, 31.5, 12.5, f"NVIDIA Ada GPU architecture, appendix A; PCIe 4.0 x16, {_CARD}"
    ),
    "rtx5090": Accelerator(
        32, 209.5, 63, 12.5, f"NVIDIA RTX Blackwell GPU architecture, appendix A; PCIe 5.0 x16, {_CARD}"
    ),
}  # fmt: skip
"""Name -> device. Memory sizes are the data sheets' numbers; --usable_fraction leaves room for what is not usable."""
