"""Next-token sampling, one full forward per token.

Legend: s sequence, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn."""

    max_new_tokens: int = 128
    """Tokens to add at the most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0: among all."""
    seed: int = 0
    """Seeds the draws."""

    def problems(self) -> list[str]:
        """What cannot be, one line each."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature}: 0 (greedy) or more")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k}: 0 (all) or more")
        return found


def next_token(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Draw one token from fp32 logits [v] (on the CPU)."""
    if options.temperature == 0:
        return int(logits.argmax())
    scaled = logits / options.temperature
    if 0 < options.top_k < scaled.numel():
        floor = scaled.topk(options.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    return int(torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator))


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: list[int],
    options: SamplingOptions,
    *,
    vocab_size: int,
    context_tokens: int,
    end_id: int | None,
) -> Iterator[int]:
    """Yield new tokens one by one until the end token or ``max_new_tokens``.

    Args:
        model: Maps input ids and position ids [1, s] to logits [1, s, v].
        prompt_ids: At least one token.
        vocab_size: Entries of the tokenizer; ids above it are the embedding's padding and never drawn.
        context_tokens: Sequence length that the model was trained with; the window slides over what is longer.
        end_id: Token that ends a document, if there is one; it is not yielded.
    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids is empty; give at least one token")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(options.seed)
    window = list(prompt_ids)
    for _ in range(options.max_new_tokens):
        window = window[-context_tokens:]
        input_ids = torch.tensor([window], device=device)
        position_ids = torch.arange(len(window), device=device)[None]
        logits = model(input_ids, position_ids, None)[0, -1, :vocab_size].float().cpu()
        token = next_token(logits, options, generator)
        if token == end_id:
            return
        window.append(token)
        yield token
