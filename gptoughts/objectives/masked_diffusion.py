"""Masked diffusion: predict the masked tokens of a randomly masked row (LLaDA, arXiv:2502.09992, section 2.2, eq. 3).

Row i has a masking level t_i ~ U[0, 1) and p_i = (1 - epsilon) t_i + epsilon; each position is masked with probability
p_i, and

    loss = sum_i (1 / p_i) sum_(j masked) -log p(x_ij | masked row i)  /  number of positions,

an upper bound of the negative log-likelihood per token in expectation (SMDM, arXiv:2410.18514, section 2). Labels are
not shifted: a position predicts its own token (unless ``is_shifted``). A few samples are cut to a random length; rows
keep their shape, the positions beyond the end are hidden from attention and count nowhere.

All randomness comes from Philox (Salmon et al., SC 2011), a counter-based generator keyed by (seed, global sample
index): no layout, microbatch or resumption can change it.

Legend: b microbatch, s sequence, n selected positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptoughts.objectives.base import ModelInputs

SELECTION_MULTIPLE = 16
"""Selected positions are padded to a multiple of it: matrix products like round sizes."""
VALIDATION_SEED = 0
"""Seeds validation's noise, the same in every run, so that runs can be compared."""
_SAMPLE_STREAM, _BATCH_STREAM = 0, 1
_FIRST_POSITION = 4
"""Draws of a sample: level, whether it is cut, its length, one unused, then one per position."""


def uniform_draws(seed: int, stream: int, index: int, count: int) -> NDArray[np.float64]:
    """``count`` numbers from U[0, 1), fp64, a function of the arguments alone; a longer draw starts with a shorter one.

    Args:
        seed: The run's, below 2^32.
        stream: Which use of randomness, below 2^32.
        index: Global index of the sample (or batch).
        count: How many.
    """
    key = np.array([(stream << 32) | seed, index], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count)
    # numpy guarantees a bit generator's raw stream over its versions, but not its floating-point methods.
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class MaskedDiffusion:
    """Objective of the family ``llada``."""

    mask_token_id: int
    """What stands at a masked position."""
    seed: int
    """Seeds the noise."""
    epsilon: float = 1e-3
    """Smallest masking probability."""
    random_length_probability: float = 0.01
    """Probability that a sample is cut to a length from U{1 ... s}."""
    stratified_samples: int | None = None
    """Low-discrepancy levels: of every so many consecutive samples (the global batch B), sample i has level
    (u + i / B) mod 1 with one u for all of them. Unset: levels are independent."""
    is_shifted: bool = False
    """The output at position i predicts token i + 1, as a next-token model's does (DiffuLLaMA, arXiv:2410.17891,
    section 3.2; Dream, arXiv:2508.15487): nothing predicts a row's first token, which is never masked nor counted."""

    num_extra_tokens = 0

    def prepare(self, tokens: Tensor, sample_indices: Tensor) -> ModelInputs:
        """Mask rows; the positions whose loss counts are selected for the output layer.

        Args:
            tokens: int64 [b, s], on the CPU.
            sample_indices: int64 [b], global sample index of each row.
        """
        b, s = tokens.shape
        noise = [self._noise(index, s) for index in sample_indices.tolist()]
        lengths = torch.tensor([length for length, _, _ in noise])
        probability = torch.tensor([p for _, p, _ in noise], dtype=torch.float64)
        positions = torch.arange(s)
        is_inside = positions < lengths[:, None]
        is_counted = is_inside & (positions >= int(self.is_shifted))
        is_masked = torch.from_numpy(np.stack([masked for _, _, masked in noise])) & is_counted
        is_cut = not bool(is_inside.all())
        inputs = tokens.masked_fill(is_masked, self.mask_token_id)
        labels = tokens
        if self.is_shifted:
            labels, is_masked, is_counted = (x.roll(-1, dims=1) for x in (tokens, is_masked, is_counted))
        return ModelInputs(
            input_ids=inputs,
            position_ids=positions.expand(b, -1),
            labels=labels,
            loss_weights=(is_masked / probability[:, None]).float(),
            denominator=is_counted.sum().double(),
            is_counted=is_counted,
            selected_positions=select_positions(is_masked),
            attention_mask=~is_inside[:, None, None, :] if is_cut else None,
            is_padding=~is_inside if is_cut else None,
        )

    def reduce(self, per_token_loss: Tensor, loss_weights: Tensor) -> Tensor:
        """Weighted sum of token losses [b, s] -> fp32 scalar, nats."""
        if per_token_loss.shape != loss_weights.shape:
            raise ValueError(
                f"per_token_loss {tuple(per_token_loss.shape)} and loss_weights {tuple(loss_weights.shape)} differ"
            )
        return (per_token_loss.float() * loss_weights).sum()

    def for_validation(self, num_samples: int) -> MaskedDiffusion:
        """The bound on whole rows with fixed noise, whose levels are spread evenly over the validation samples."""
        return replace(
            self, seed=VALIDATION_SEED, random_length_probability=0.0, stratified_samples=max(1, num_samples)
        )

    def _noise(self, index: int, s: int) -> tuple[int, float, NDArray[Any]]:
        """Length, masking probability and (before cutting) masked positions, bool [s], of one sample."""
        draws = uniform_draws(self.seed, _SAMPLE_STREAM, index, _FIRST_POSITION + s)
        level = draws[0]
        if self.stratified_samples is not None:
            batch, row = divmod(index, self.stratified_samples)
            shared = uniform_draws(self.seed, _BATCH_STREAM, batch, 1)[0]
            level = (shared + row / self.stratified_samples) % 1.0
        probability = float((1.0 - self.epsilon) * level + self.epsilon)
        shortest = 1 + int(self.is_shifted)
        length = shortest + int(draws[2] * (s - shortest + 1)) if draws[1] < self.random_length_probability else s
        return length, probability, draws[_FIRST_POSITION:] < probability


def select_positions(is_target: Tensor) -> Tensor:
    """Where the output layer has to run: all targets, padded with other positions to a multiple of 16.

    The padding's loss is computed and has weight 0, so nothing downstream needs to know of it. At least one multiple is
    selected even where nothing is masked: every parameter then takes part in every step.

    Args:
        is_target: bool [b, s].
    Returns:
        int64 [n], distinct indices into the flattened [b, s].
    """
    flat = is_target.flatten()
    targets = flat.nonzero().squeeze(1)
    blocks = max(1, -(-len(targets) // SELECTION_MULTIPLE))
    missing = min(blocks * SELECTION_MULTIPLE, len(flat)) - len(targets)
    return torch.cat((targets, (~flat).nonzero().squeeze(1)[:missing]))
