"""Weights published in FP8 by blocks (DeepSeek-V3's files), read as the matrices that they stand for.

A matrix W [r, c] is stored as E4M3 values Q [r, c] with one factor per block, ``weight_scale_inv`` S [⌈r/a⌉, ⌈c/b⌉]:

    W[i, j] = Q[i, j] S[i // a, j // b]

(DeepSeek-V3, arXiv:2412.19437, section 3.3.2; its repository's README_WEIGHTS.md, "FP8 weight documentation").
Imports torch only where a tensor is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FP8 = "F8_E4M3"
"""safetensors' name of the stored dtype."""
SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16")


@dataclass(frozen=True)
class BlockQuantization:
    """Rows and columns that share a factor."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the factors of a matrix [r, c]."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """The matrix that they stand for, fp32 [r, c].

        Args:
            values: E4M3 [r, c].
            scales: [⌈r/a⌉, ⌈c/b⌉].
        """
        rows, columns = values.shape
        factors = scales.float().repeat_interleave(self.rows, 0)[:rows]
        return values.float().mul_(factors.repeat_interleave(self.columns, 1)[:, :columns])


def read_quantization(config: Mapping[str, Any], problems: list[str]) -> BlockQuantization | None:
    """How config.json says that the weights are quantized; what is not read goes to ``problems``."""
    found = config.get("quantization_config")
    if found is None:
        return None
    block = found.get("weight_block_size")
    is_known = found.get("quant_method") == "fp8" and found.get("fmt", "e4m3") == "e4m3"
    is_block = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if not (is_known and is_block):
        said = ", ".join(f"{name}={found.get(name)!r}" for name in ("quant_method", "fmt", "weight_block_size"))
        problems.append(
            f"quantization_config ({said}): quantized weights are not read but for quant_method='fp8', fmt='e4m3' "
            "with a weight_block_size of two numbers; dequantize them first"
        )
        return None
    return BlockQuantization(*block)
