"""What a sampler of next tokens may be asked for; imports no torch, so that a mistake costs no seconds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, and how many."""

    max_new_tokens: int = 128
    """Tokens to add at the most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together hold this probability only; 1: among all."""
    min_p: float = 0.0
    """Draw among tokens of at least this fraction of the likeliest one's probability only; 0: among all."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely to come again; 1: as they are."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    seed: int = 0
    """Seeds the draws of one request, whatever others run beside it."""

    def problems(self) -> list[str]:
        """What cannot be, one line each."""
        limits = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0, at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "greater than 0; 1 changes nothing"),
            ("stop", all(self.stop), "an empty text ends every answer; leave it out"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        return [f"{name}={getattr(self, name)}: {text}" for name, is_right, text in limits if not is_right]

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the logits' largest, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True)
class NextTokenCommand(SamplingOptions):
    """Flags of ``launchers/generate.py`` for families that predict the next token."""

    batch_rows: int = 8
    """Prompts that are answered at once at the most."""
    prefill_tokens: int = 1024
    """Tokens of prompts that one forward reads."""

    speculative: bool = False
    """Let multi-token prediction guess the token after the next, for models that have it: the same answers in fewer
    forwards. Prompts are then answered one by one."""

    def refusals(self, stated: Collection[str], num_prompts: int) -> list[str]:
        """What cannot be, one line each (``answers.Command``)."""
        counts = (("batch_rows", self.batch_rows), ("prefill_tokens", self.prefill_tokens))
        return self.problems() + [f"{name}={value}: at least 1" for name, value in counts if value < 1]
