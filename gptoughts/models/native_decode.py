"""A few tokens of each row through a dense decoder in one call of our own C++ (``native_decode.cpp``).

For fp32 on a CPU. What it gains: products of some eight rows take half the time of MKL's, and a layer costs its
products, not the thirty operators around them, of which a token of a small model takes as long. Its numbers do not
depend on which rows are beside a row, nor on the number of threads; tests compare it with the modules.

Legend: b rows, s tokens of each, n = b s, h hidden, hn head dim.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from gptoughts.models.attention import SelfAttention
from gptoughts.models.kv_cache import CacheWindow
from gptoughts.parallel import groups
from gptoughts.platform import huge_pages, native_library

SOURCE = Path(__file__).with_suffix(".cpp")
MOST_ROWS = 64
"""Above, a product's time is that of its arithmetic, where libraries are at their best."""
_MOST_HEAD_DIM = 512
_LAYER_POINTERS = 11
_KEYS, _VALUES = 9, 10

_Pointer, _Count = ctypes.c_void_p, ctypes.c_int64


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _Count) for name in ("hidden", "groups", "per_group", "head_dim", "feed_forward", "places")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "scale")),
    ]


class _Window(ctypes.Structure):
    _fields_ = [
        ("sequences", _Count), ("tokens", _Count),
        *((name, _Pointer) for name in ("positions", "visible", "cos", "sin")),
    ]  # fmt: skip


def native_decoder(model: Any, output: Tensor) -> NativeDecoder | None:
    """The decoder of a model that ``decode_step.is_decodable`` knows; None if it does not suit C++, or that is missing.

    Large weights are moved into large pages; they stay the parameters that they are, of the same values.

    Args:
        model: Whose weights, as they are now, count.
        output: [v, h], of its output layer.
    """
    if groups.tensor_parallel_size() > 1 or not _is_fitting(output) or not all(map(_is_known, model.decoder.layers)):
        return None
    if not _is_fitting(model.decoder.final_layernorm.weight):
        return None
    found = library()
    if found is None or not found.decode_width():
        return None
    attention = model.decoder.layers[0].self_attention
    widths = (model.config.hidden_size, model.config.ffn_hidden_size, attention.hidden_size_per_attention_head)
    if any(width % found.decode_width() for width in widths) or widths[2] > _MOST_HEAD_DIM:
        return None
    for weight in (output, *(w for layer in model.decoder.layers for w in _parameters_of(layer) if w is not None)):
        weight.data = huge_pages.moved(weight.data)
    return NativeDecoder(found, model, output)


class NativeDecoder:
    """Made by :func:`native_decoder`."""

    def __init__(self, library: ctypes.CDLL, model: Any, output: Tensor) -> None:
        self.library, self.output = library, output.detach()
        attention, norm = model.decoder.layers[0].self_attention, model.decoder.final_layernorm
        self.groups, self.head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self.shape = _Shape(
            model.config.hidden_size, self.groups, attention.num_attention_heads_per_partition // self.groups,
            self.head_dim, model.config.ffn_hidden_size, 0,
            norm.eps, getattr(attention.q_layernorm, "eps", 0.0), self.head_dim**-0.5,
        )  # fmt: skip
        # Held, so that what the pointers point at stays.
        self.weights = [
            [None if weight is None else weight.detach() for weight in _parameters_of(layer)]
            for layer in model.decoder.layers
        ]
        self.final_norm = norm.weight.detach()
        self.layers = np.zeros((len(self.weights), _LAYER_POINTERS), dtype=np.int64)
        for number, weights in enumerate(self.weights):
            self.layers[number, : len(weights)] = [0 if w is None else w.data_ptr() for w in weights]

    def states(self, x: Tensor, window: CacheWindow, cos: Tensor, sin: Tensor) -> Tensor:
        """States after the final norm of a window's embedded tokens, which the cache then holds too.

        Args:
            x: [n, h], row after row; overwritten with what is returned.
            window: Of which each token looks at the first places of its row, as those of ``CacheWindow``'s constructors
                do that are not causal.
            cos: (cos | cos) at the positions, [b or 1, s, hn].
            sin: (-sin | sin).

        Raises:
            MemoryError: there is none for the activations.
        """
        (b, s), cache = window.positions.shape, window.cache
        _check(x, (b * s, self.shape.hidden))
        for kept in cache.whole:  # pointers know no shapes: a mistake would be a write to somewhere
            _check(kept, (len(self.layers), cache.rows, self.groups, cache.places, self.head_dim))
        assert not window.is_causal
        positions = window.positions.contiguous()
        assert positions.dtype == torch.int64
        if window.is_visible is None:
            visible = torch.full((b, s), window.num_places, dtype=torch.int64, device="cpu")
        else:
            visible = window.is_visible.sum(dim=-1)[:, 0].expand(b, s).contiguous()
        turns = [part.expand(b, s, self.head_dim).contiguous() for part in (cos, sin)]
        assert all(part.dtype == torch.float32 for part in turns)
        for column, kept in zip((_KEYS, _VALUES), cache.whole, strict=True):
            layer_bytes, row_bytes = (kept.stride(dim) * kept.element_size() for dim in (0, 1))
            first = kept.data_ptr() + window.first_row * row_bytes
            self.layers[:, column] = first + layer_bytes * np.arange(len(self.layers))
        self.shape.places = cache.places
        described = _Window(b, s, positions.data_ptr(), visible.data_ptr(), turns[0].data_ptr(), turns[1].data_ptr())
        status = self.library.decode_layers(
            ctypes.byref(self.shape), self.layers.ctypes.data, len(self.layers), self.final_norm.data_ptr(),
            ctypes.byref(described), x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for the activations of {b * s} tokens")
        return x

    def logits(self, states: Tensor) -> Tensor:
        """[n, h] to [n, whole vocabulary]."""
        states = states.contiguous()
        outputs, inputs = self.output.shape
        _check(states, (states.size(0), inputs))
        logits = states.new_empty(states.size(0), outputs)
        self.library.decode_product(
            states.data_ptr(), states.size(0), self.output.data_ptr(), inputs, outputs, logits.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return logits


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    assert tensor.shape == shape, f"{tuple(tensor.shape)} where {shape} is expected"
    assert _is_fitting(tensor)


def library() -> ctypes.CDLL | None:
    """The C++, with what its functions take; None where it cannot be had."""
    found = native_library.load(SOURCE)
    if found is not None:
        found.decode_width.restype = _Count
        found.decode_product.argtypes = [_Pointer, _Count, _Pointer, _Count, _Count, _Pointer, ctypes.c_int]
        found.decode_product.restype = None
        found.decode_layers.argtypes = [_Pointer, _Pointer, _Count, _Pointer, _Pointer, _Pointer, ctypes.c_int]
    return found


def _parameters_of(layer: Any) -> list[Tensor | None]:
    """In the order of the C++ ``Layer``."""
    attention, mlp = layer.self_attention, layer.mlp
    norms = [norm.weight if _has_weight(norm) else None for norm in (attention.q_layernorm, attention.k_layernorm)]
    return [
        layer.input_layernorm.weight, attention.linear_qkv.weight, attention.linear_qkv.bias, *norms,
        attention.linear_proj.weight, layer.pre_mlp_layernorm.weight, mlp.linear_fc1.weight, mlp.linear_fc2.weight,
    ]  # fmt: skip


def _has_weight(norm: Any) -> bool:
    return norm is not None and not isinstance(norm, IdentityOp)


def _is_known(layer: Any) -> bool:
    if not isinstance(layer.self_attention, SelfAttention) or not isinstance(layer.mlp, MLP):
        return False
    return all(weight is None or _is_fitting(weight) for weight in _parameters_of(layer))


def _is_fitting(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
