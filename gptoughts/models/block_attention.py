"""Attention of some queries to some of the keys that they look at, and its gradients, given what belongs to the whole.

On a CPU ``models.tiled_attention`` does it where nothing is masked. Elsewhere it is written out, in tiles of queries
and wholly in fp32, for any device: P = exp(scale q k^T - l) with the log-sum-exp l,

    dv = P^T do,   dS = P * (do v^T - delta),   dq = scale dS k,   dk = scale dS^T q.

Legend: s queries, k keys, b microbatch, np heads and ng key/value heads on this rank, g = np / ng, hn head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptoughts.models import tiled_attention

_TILE_ELEMENTS = 1 << 24
"""Scores of a tile: 64 MiB."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor | None, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [b, np, s, hn_v] and log-sum-exp, fp32 [b, np, s] (minus infinity where a query sees no key).

    Args:
        query: [s, b, np, hn].
        key: [k, b, ng, hn].
        value: [k, b, ng, hn_v].
        forbidden: bool [1 or b, k], keys that nobody looks at; None: there are none.
        scale: Factor of the scores.
        is_causal: Query i looks at keys 0 ... i; s = k.
    """
    if _is_tiled(query, forbidden):
        return tiled_attention.attend(query, key, value, scale=scale, is_causal=is_causal)
    wide_value = value.float().permute(1, 2, 0, 3).unsqueeze(2)
    outs, sums = [], []
    for rows in _tiles(query, key):
        scores = _scores(query[rows], key, forbidden, rows.start if is_causal else None, scale)
        lse = scores.logsumexp(-1)
        seen = lse.masked_fill(lse == float("-inf"), 0.0)
        outs.append(scores.sub_(seen.unsqueeze(-1)).exp_() @ wide_value)
        sums.append(lse)
    return torch.cat(outs, dim=3).flatten(1, 2), torch.cat(sums, dim=3).flatten(1, 2)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    forbidden: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each of its tensor's shape; those of keys and values in fp32.

    Args:
        query: [s, b, np, hn].
        key: [k, b, ng, hn].
        value: [k, b, ng, hn_v].
        grad: Of the whole output, [b, np, s, hn_v].
        lse: fp32 [b, np, s], over all keys that the queries look at.
        delta: fp32 [b, np, s], grad times the whole output.
        forbidden: As in :func:`attend`.
        scale: Factor of the scores.
        is_causal: As in :func:`attend`.
    """
    if _is_tiled(query, forbidden):
        return tiled_attention.gradients(query, key, value, grad, lse, delta, scale=scale, is_causal=is_causal)
    ng = key.size(2)
    wide_key, wide_value = (x.float().permute(1, 2, 0, 3).unsqueeze(2) for x in (key, value))
    grad, lse, delta = (x.float().unflatten(1, (ng, -1)) for x in (grad, lse, delta))
    grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    of_queries = []
    for rows in _tiles(query, key):
        scores = _scores(query[rows], key, forbidden, rows.start if is_causal else None, scale)
        probabilities = scores.sub_(lse[..., rows, None]).exp_()
        upstream = grad[..., rows, :]
        grad_value += (probabilities.transpose(-1, -2) @ upstream).sum(2, keepdim=True)
        grad_scores = (upstream @ wide_value.transpose(-1, -2)).sub_(delta[..., rows, None])
        grad_scores.mul_(probabilities).mul_(scale)
        of_queries.append(grad_scores @ wide_key)
        wide_query = _heads(query[rows], ng)
        grad_key += (grad_scores.transpose(-1, -2) @ wide_query).sum(2, keepdim=True)
    grad_query = torch.cat(of_queries, dim=3).flatten(1, 2).permute(2, 0, 1, 3)
    grad_key, grad_value = (x.squeeze(2).permute(2, 0, 1, 3) for x in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _is_tiled(query: Tensor, forbidden: Tensor | None) -> bool:
    is_known = query.dtype in (torch.float32, torch.bfloat16)
    return forbidden is None and query.device.type == "cpu" and is_known


def _tiles(query: Tensor, key: Tensor) -> Iterator[slice]:
    s, b, np, _ = query.shape
    step = max(1, _TILE_ELEMENTS // (b * np * key.size(0)))
    for start in range(0, s, step):
        yield slice(start, min(start + step, s))


def _heads(query: Tensor, ng: int) -> Tensor:
    """[s, b, np, hn] to fp32 [b, ng, g, s, hn]."""
    return query.float().unflatten(2, (ng, -1)).permute(1, 2, 3, 0, 4)


def _scores(query: Tensor, key: Tensor, forbidden: Tensor | None, first: int | None, scale: float) -> Tensor:
    """fp32 [b, ng, g, s, k]; under a causal mask the first of the queries is number ``first``."""
    wide_key = key.float().permute(1, 2, 3, 0).unsqueeze(2)
    scores = (_heads(query, key.size(2)) * scale) @ wide_key
    if first is not None:
        places = torch.arange(key.size(0), device=key.device)
        scores.masked_fill_(places > first + torch.arange(query.size(0), device=key.device)[:, None], float("-inf"))
    if forbidden is not None:
        scores.masked_fill_(forbidden[:, None, None, None, :], float("-inf"))
    return scores
