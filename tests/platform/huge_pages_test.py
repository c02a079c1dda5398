"""Memory of large pages is memory like any other."""

from __future__ import annotations

import sys

import pytest
import torch

from gptoughts.platform import huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1024, 1031), (7, 1 << 19)])
def test_it_has_the_shape_and_holds_what_is_written(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.arange(shape[0] * shape[1]).remainder(251).view(shape).to(dtype)
    found = huge_pages.empty(shape, dtype).copy_(values)
    assert found.shape == shape
    assert found.is_contiguous()
    assert torch.equal(found, values)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="large pages are asked for as Linux has it")
def test_large_tensors_begin_a_page() -> None:
    assert huge_pages.empty((1024, 1024), torch.float32).data_ptr() % (1 << 21) == 0
