"""Two tokens in one forward, where a guess is right: multi-token prediction drafts, the model itself decides.

After a token the first module of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2) guesses the one
after the next. The model then runs the token and the guess in one forward. What follows the token is drawn from its own
logits as ever; if that is the guess, the logits behind the guess are already there, and give one more token. So what is
said is what would be said without guesses, for every way of drawing: each token takes one draw from the same logits.

The module has a cache of its own. At position i it sees the model's state there and token i + 1, so it runs one token
behind, over those positions whose next token has been decided.

Legend: s tokens of a forward, h hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptoughts.inference.autoregressive import NewText, Request, accept, draw_tokens
from gptoughts.models.kv_cache import CacheWindow, KVCache, attached, attention_layers, cached_states


class SpeculativeGenerator:
    """Runs requests one after the other, with guesses.

    Args:
        model: A ``LanguageModel`` with multi-token prediction, in evaluation mode.
        vocab_size: Entries of the tokenizer.
        context_tokens: Tokens of a sequence at the most: the cache's places.
        end_ids: Tokens that end an answer.
        prefill_tokens: Tokens of a prompt that one forward reads.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        context_tokens: int,
        end_ids: Iterable[int] = (),
        prefill_tokens: int = 1024,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.prefill_tokens = prefill_tokens
        self.cache = KVCache.of_model(model, rows=1, places=context_tokens, with_prediction=True)
        self.num_guesses = self.num_right = 0
        """Of all requests so far."""

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[NewText]:
        """As ``BatchGenerator.run``. Collective: tensor-parallel group."""
        for request in requests:
            prompt = request.prompt_ids
            if not 0 < len(prompt) < self.cache.places:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens: 1 to {self.cache.places - 1} have room in a context of "
                    f"{self.cache.places} and leave some for an answer"
                )
            starts = range(0, len(prompt), self.prefill_tokens)
            states = torch.cat([self._states(prompt[at : at + self.prefill_tokens], at) for at in starts])
            yield self._take(request, states[-1:])
            start = 0
            while request.end_reason is None:
                decided = request.ids[start + 1 :]
                guess = self._guess(states, start, decided)
                start = request.num_tokens - 1
                states = self._states([request.ids[-1], guess], start)
                yield self._take(request, states[:1])
                is_right = request.new_ids[-1] == guess and request.end_reason is None
                self.num_guesses += 1
                self.num_right += is_right
                if is_right:
                    yield self._take(request, states[1:])
                else:
                    states = states[:1]

    def _states(self, tokens: Sequence[int], start: int) -> Tensor:
        """The model's states [s, 1, h] of tokens from a position on."""
        window = CacheWindow.looking_back(self.cache, [start], len(tokens))
        return cached_states(self.model, torch.tensor([list(tokens)], device=self.cache.device), window)

    def _take(self, request: Request, state: Tensor) -> NewText:
        """Draw the token that follows a state [1, 1, h]."""
        logits = self.model.logits(state)[0, :, : self.vocab_size]
        (token,) = draw_tokens(logits, [request])
        return NewText(request, accept(request, token, self.end_ids, self.cache.places))

    def _guess(self, states: Tensor, start: int, following: Sequence[int]) -> int:
        """The token after the last of ``following``, which follow the positions of ``states`` [s, 1, h]."""
        model, count = self.model, len(following)
        window = CacheWindow.looking_back(self.cache, [start], count)
        attention = attention_layers(model, with_prediction=True)
        own = len(model.decoder.layers)
        embedded = model.embedding(
            input_ids=torch.tensor([list(following)], device=self.cache.device), position_ids=None
        )
        with attached(attention[own : own + 1], window.layers()[own : own + 1]):
            predicted = model.mtp.layers[0](
                states[:count],
                embedded,
                attention_mask=None,
                rotary_pos_emb=model.rotary_table(self.cache.places, window.positions),
            )
        return int(model.logits(predicted[-1:])[0, 0, : self.vocab_size].argmax())
