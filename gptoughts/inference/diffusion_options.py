"""What a masked-diffusion sampler may be asked for; imports no torch, so that a mistake costs no seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

USUAL_BLOCK = 32
"""Positions of a block where nothing is said (Fast-dLLM, arXiv:2505.22618, table 1; LLaDA, arXiv:2502.09992, B.4)."""


@dataclass(frozen=True)
class DiffusionOptions:
    """How masked positions are restored. With ``threshold`` and ``factor`` unset, as LLaDA publishes it."""

    max_new_tokens: int = 128
    """Masks after a prompt; of no effect on rows that bring masks of their own."""
    block_length: int | None = None
    """Masks that are restored before those to their right are looked at. Unset: 32 where the answer is a multiple of
    it, else all of them."""
    steps: int | None = None
    """Steps for a whole row, divided evenly over its blocks. Unset: one for each mask."""
    temperature: float = 0.0
    """Scale of the Gumbel noise on the logits; 0 takes the likeliest token."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions a step keeps: those of the highest probability, or any."""
    cfg_scale: float = 0.0
    """Weight w of classifier-free guidance: logits u + (w + 1)(c - u), u from the row without its prompt; 0: none."""
    suppress_eos: bool = False
    """Never predict the end of the text."""
    defer_ends: bool = False
    """Ends of text and of turn get no confidence: they are kept last."""
    threshold: float | None = None
    """Keep every prediction of at least this probability, and always the best one, instead of a number per step."""
    factor: float | None = None
    """Keep the n best predictions while (n + 1)(1 - probability of the n-th) stays within this, and always one."""
    cache: Literal["none", "prefix", "dual", "delayed"] = "none"
    """Which keys and values stay as they were at a block's start. none: none. prefix: those before the block. dual: all
    outside it. delayed: besides, those of its given tokens, and of a restored one from the step after next on."""
    stop_at_end: bool = True
    """Leave a row once its answer has an end of text or turn with no mask before it; what stands before that end is the
    same. Rows that go on after their masks are not left."""
    seed: int = 0
    """Seeds the noise of every row."""

    @property
    def is_parallel(self) -> bool:
        """Whether confidence decides how many tokens a step keeps."""
        return self.threshold is not None or self.factor is not None

    def problems(self, num_masks: int | None = None) -> list[str]:
        """What cannot be, one line each.

        Args:
            num_masks: Masks of a row that brings its own; unset: ``max_new_tokens`` after a prompt.
        """
        found = self._value_problems()
        count = self.max_new_tokens if num_masks is None else num_masks
        if count < 1:
            return [*found, f"max_new_tokens={self.max_new_tokens}: at least 1"] if num_masks is None else found
        length = self.block_length
        if length is not None and not 1 <= length <= count:
            whole = "max_new_tokens" if num_masks is None else "the number of masks"
            return [*found, f"block_length={length}: from 1 to {whole}, {count}"]
        if length is not None and num_masks is None and count % length:
            found.append(
                f"block_length={length}: max_new_tokens={count} is not divisible by it; allowed: {_divisors(count)}"
            )
        elif self.steps is not None and self.steps > 0 and not self.is_parallel:
            blocks = self.num_blocks(count)
            if self.steps % blocks or self.steps > count:
                found.append(
                    f"steps={self.steps}: a multiple of the number of blocks, {blocks} ({count} masks in blocks of "
                    f"{self.filled_block_length(count)}), and at most {count}, one for each mask"
                )
        return found

    def filled_block_length(self, num_masks: int) -> int:
        """The block length of a row with that many masks."""
        if self.block_length is not None:
            return self.block_length
        return USUAL_BLOCK if num_masks % USUAL_BLOCK == 0 else num_masks

    def num_blocks(self, num_masks: int) -> int:
        """Blocks of a row with that many masks; the last one may be shorter where a row brings its own."""
        return -(-num_masks // self.filled_block_length(num_masks))

    def steps_per_block(self, num_masks: int) -> int:
        """Steps of each block of a row with that many masks, where their number is fixed."""
        if self.steps is None:
            return self.filled_block_length(num_masks)
        return self.steps // self.num_blocks(num_masks)

    def _value_problems(self) -> list[str]:
        found = []
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature}: 0 (the likeliest token) or more")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed}: from 0 to 2^63 - 1")
        if self.remasking not in ("low_confidence", "random"):
            found.append(f"remasking={self.remasking!r}: low_confidence or random")
        if self.cache not in ("none", "prefix", "dual", "delayed"):
            found.append(f"cache={self.cache!r}: none, prefix, dual or delayed")
        if not 0 <= self.cfg_scale < math.inf:
            found.append(f"cfg_scale={self.cfg_scale}: 0 (no guidance) or more")
        if self.steps is not None and self.steps < 1:
            found.append(f"steps={self.steps}: at least 1")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            found.append(f"threshold={self.threshold}: a probability above 0, up to 1")
        if self.factor is not None and not 0 < self.factor < math.inf:
            found.append(f"factor={self.factor}: greater than 0")
        if self.threshold is not None and self.factor is not None:
            found.append(f"threshold={self.threshold} and factor={self.factor}: one rule at a time")
        if self.is_parallel:
            name = "threshold" if self.threshold is not None else "factor"
            if self.steps is not None:
                found.append(
                    f"steps={self.steps}: with {name} confidence decides how many steps there are; leave it out"
                )
            if self.remasking != "low_confidence":
                found.append(f"remasking={self.remasking}: {name} compares probabilities; only low_confidence")
        return found


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
