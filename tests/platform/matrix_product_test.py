"""fp32 products by oneDNN are torch's own, for every arrangement of operands that the layers hand over."""

import pytest
import torch

from gptoughts.platform import matrix_product


def _operand(rows: int, columns: int, seed: int, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "dense":
        return torch.randn(rows, columns, generator=generator)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns + 5, generator=generator)[:, :columns]  # gaps between the rows


@pytest.fixture(params=["as on this processor", "always oneDNN", "never oneDNN", "exchanged sides"])
def _choice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as on this processor":
        wider = request.param == "always oneDNN"
        if wider and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch has no such operator")
        monkeypatch.setattr(matrix_product, "is_onednn_wider", lambda: wider)
        monkeypatch.setattr(matrix_product, "_is_mkl_wide", lambda: request.param == "exchanged sides")


@pytest.mark.usefixtures("_choice")
@pytest.mark.parametrize("layout", ["dense", "transposed", "gaps"])
@pytest.mark.parametrize(
    ("n", "outputs", "inputs"), [(512, 96, 160), (300, 160, 96), (32, 96, 640), (3, 4, 5), (0, 64, 64)]
)
def test_products(n: int, outputs: int, inputs: int, layout: str) -> None:
    rows, weight = _operand(n, inputs, 0, layout), _operand(outputs, inputs, 1, layout)
    grad = _operand(n, outputs, 2, layout)
    for got, expected in (
        (matrix_product.linear(rows, weight), rows.double() @ weight.double().t()),
        (matrix_product.matmul(grad, weight), grad.double() @ weight.double()),
        (matrix_product.weight_gradient(grad, rows), grad.double().t() @ rows.double()),
    ):
        assert got.is_contiguous()
        # fp32 sums of up to 512 products of unit size.
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_choice")
def test_leading_dimensions_and_bf16() -> None:
    rows, weight = torch.randn(16, 32, 160), torch.randn(96, 160)
    expected = torch.nn.functional.linear(rows, weight)
    torch.testing.assert_close(matrix_product.linear(rows, weight), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix_product.matmul(expected, weight), expected @ weight, rtol=0, atol=1e-2)
    few, wide = torch.randn(4, 8, 640), torch.randn(96, 640)
    torch.testing.assert_close(
        matrix_product.linear(few, wide), torch.nn.functional.linear(few, wide), rtol=0, atol=1e-3
    )
    low, low_weight = rows.bfloat16(), weight.bfloat16()
    assert torch.equal(matrix_product.linear(low, low_weight), torch.nn.functional.linear(low, low_weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "is_onednn_wider", lambda: True)
    rows, weight, grad = (torch.randn(n, m).to(dtype) for n, m in ((37, 64), (96, 64), (37, 96)))
    padded, padded_grad = matrix_product.padded_rows(rows), matrix_product.padded_rows(grad)
    assert padded.shape == (64, 64)
    assert matrix_product.padded_rows(padded) is padded
    tolerance = 1e-4 if dtype is torch.float32 else 0.25
    for got, expected in (
        (matrix_product.linear(padded, weight)[:37], rows.double() @ weight.double().t()),
        (matrix_product.weight_gradient(padded_grad, padded), grad.double().t() @ rows.double()),
    ):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_processor_is_known_here_or_torch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not matrix_product.is_onednn_wider.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(matrix_product, "_is_intel", lambda: True)
    assert not matrix_product.is_onednn_wider.__wrapped__()
    monkeypatch.setattr(matrix_product, "_is_intel", lambda: False)
    assert matrix_product.is_onednn_wider.__wrapped__() == hasattr(torch.ops.mkldnn, "_linear_pointwise")
