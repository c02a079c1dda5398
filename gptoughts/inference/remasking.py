"""One step of masked-diffusion sampling on given logits: predict every mask, then choose which predictions to keep.

With logits l at a mask, noise T and G ~ Gumbel(0, 1) for each token (LLaDA, arXiv:2502.09992, appendix A.3, alg. 5;
https://github.com/ML-GSAI/LLaDA, generate.py):

    x = argmax(l + T G),    c = softmax(l)[x]  (low_confidence)  or  c ~ U[0, 1)  (random),

and the best predictions by c are kept: a fixed number; all with c >= threshold; or the n best, as long as
(n + 1)(1 - c_n) <= factor (Fast-dLLM, arXiv:2505.22618, section 3.3). Noise is fp64: a Gumbel maximum in lower
precision samples from a sharper distribution (arXiv:2409.02908).

Legend: r rows, n masks of all rows, row after row, s sequence, v tokenizer's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.sampling import likeliest


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a sampler treats in their own way."""

    mask: int
    """What stands where a token is to be restored; never predicted."""
    eos: int | None = None
    """Ends a text."""
    eot: int | None = None
    """Ends a turn."""

    def ends(self) -> tuple[int, ...]:
        """Those that end an answer."""
        return tuple(token for token in (self.eos, self.eot) if token is not None)


def predict(
    logits: Tensor,
    counts: Sequence[int],
    options: DiffusionOptions,
    special: SpecialTokens,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n] and confidences fp64 [n] at all masks.

    A row draws from its own generator, fp64: [its masks, v] where there is noise, then [its masks] where remasking is
    random. So what it draws does not depend on the rows beside it.

    Args:
        logits: [n, v], without the padding of the vocabulary.
        counts: Masks of each row; they add up to n.
        options: Temperature, remasking, what happens to ends.
        special: Ids.
        generators: One for each row, on the device of the logits.
    """
    # Noise needs fp64 throughout; without it the largest logit is the same in fp32, and so (below) is its probability.
    logits = logits.to(torch.float64 if options.temperature > 0 else torch.float32, copy=True)
    logits[:, special.mask : special.mask + 1] = -torch.inf  # it may be the first id beyond a tokenizer's
    if options.suppress_eos and special.eos is not None:
        logits[:, special.eos] = -torch.inf
    noisy = logits
    if options.temperature > 0:
        uniform = _draws(generators, counts, logits.size(1), logits.device)
        # exp(l) / (-log u)^T as published, in its logarithm: large logits have no exponential.
        noisy = logits - options.temperature * uniform.log_().neg_().log_()
    tokens = likeliest(noisy)
    if options.remasking == "random":
        return tokens, _draws(generators, counts, 1, logits.device).squeeze(1)
    if options.defer_ends:
        # Published as: logits_with_noise[eos] = logits[eot] = -inf. At T > 0 these are two tensors, and the text's end
        # keeps its confidence; meant is this.
        for token in special.ends():
            logits[:, token] = -torch.inf
    return tokens, _probabilities(logits, tokens)


def _probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """softmax(logits)[token], fp64 [n]; the logits are overwritten.

    As e / (e + the other terms' sum) with that last sum in fp64. So a probability near 1, where fp32 has few numbers,
    has the relative precision of the logits in what it lacks to 1.
    """
    terms = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    index = tokens.unsqueeze(1)
    own = terms.gather(1, index).squeeze(1).double()
    return own / (own + terms.scatter_(1, index, 0.0).sum(dim=-1).double())


def _draws(generators: Sequence[torch.Generator], counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """U[0, 1) fp64 [n, width], each row's from its own generator."""
    return torch.cat(
        [
            torch.rand(count, width, generator=generator, dtype=torch.float64, device=device)
            for generator, count in zip(generators, counts, strict=True)
        ]
    )


def choose(confidence: Tensor, options: DiffusionOptions, quota: Tensor) -> Tensor:
    """Which predictions are kept, bool [r, s]: at least one in each row that has any.

    Args:
        confidence: fp64 [r, s], -inf where there is no mask to restore.
        options: The rule.
        quota: int64 [r], predictions that a row keeps where their number is fixed.
    """
    ranked, order = confidence.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(confidence.size(-1), device=confidence.device)
    if options.threshold is not None:
        is_kept = (ranked >= options.threshold) | (rank == 0)
    elif options.factor is not None:
        is_kept = ((rank + 2) * (1.0 - ranked) <= options.factor) | (rank == 0)
    else:
        is_kept = rank < quota.unsqueeze(1)
    is_kept &= ranked > -torch.inf
    return torch.zeros_like(is_kept).scatter(1, order, is_kept)
