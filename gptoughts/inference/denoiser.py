"""A masked-diffusion model as samplers see it: rows in, logits at some of their positions out.

Classifier-free guidance (LLaDA, arXiv:2502.09992, appendix A.3; *Scaling up Masked Diffusion Models on Text*,
arXiv:2410.18514, section 5) runs each row a second time with what it was given masked:

    l = u + (w + 1)(c - u),    c logits of the row, u of the row without its prompt.

Legend: r rows, s sequence, n positions of all rows, v tokenizer's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptoughts.inference.remasking import SpecialTokens


@dataclass(frozen=True)
class Rows:
    """Rows of unequal length, padded on the right."""

    tokens: Tensor
    """int64 [r, s]; whatever stands beyond a row's end is never looked at."""
    lengths: Tensor
    """int64 [r]."""
    is_given: Tensor
    """bool [r, s]: what is not to be restored, which guidance takes away."""

    def at(self, index: Tensor) -> Rows:
        """Some of the rows, cut to the longest of them."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return Rows(self.tokens[index, :longest], lengths, self.is_given[index, :longest])


class Denoiser:
    """Logits of a model at masked positions.

    Args:
        model: A ``LanguageModel`` that looks both ways, or what is called like it.
        special: Ids.
        vocab_size: Entries of the tokenizer; what is above is the embedding's padding.
        is_shifted: The output at position i is about token i + 1 (``DiffusionFields.is_shifted``).
        cfg_scale: Guidance; 0: none.
    """

    def __init__(
        self, model: nn.Module, special: SpecialTokens, *, vocab_size: int, is_shifted: bool, cfg_scale: float
    ) -> None:
        self.model = model
        self.special = special
        self.vocab_size = vocab_size
        self.shift = int(is_shifted)
        self.cfg_scale = cfg_scale
        self.num_forwards = 0
        """Forwards of the model so far; guided rows are two in one."""

    def logits(self, rows: Rows, is_wanted: Tensor) -> Tensor:
        """Logits [n, v] at the wanted positions (bool [r, s]), row after row.

        Collective: tensor-parallel group.
        """
        s = rows.tokens.size(1)
        row, position = is_wanted.nonzero(as_tuple=True)
        selected = row * s + position - self.shift
        hidden = torch.arange(s, device=rows.tokens.device) >= rows.lengths[:, None]
        is_ragged = bool((rows.lengths < s).any())
        attention_mask = hidden[:, None, None, :] if is_ragged else None
        return self._guided(rows.tokens, rows.is_given, selected, attention_mask)

    def _guided(self, tokens: Tensor, is_given: Tensor, selected: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.cfg_scale == 0:
            return self._forward(tokens, selected, attention_mask)
        tokens = torch.cat((tokens, tokens.masked_fill(is_given, self.special.mask)))
        selected = torch.cat((selected, selected + is_given.numel()))
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask))
        guided, unguided = self._forward(tokens, selected, attention_mask).float().chunk(2)
        return unguided + (self.cfg_scale + 1.0) * (guided - unguided)

    def _forward(self, tokens: Tensor, selected: Tensor, attention_mask: Tensor | None) -> Tensor:
        self.num_forwards += 1
        logits = self.model(tokens, None, attention_mask, selected_positions=selected)
        return logits[:, : self.vocab_size]
