"""Several tokens in one forward, where guesses are right: multi-token prediction drafts, the model itself decides.

After a token the first module of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2) guesses the one
after the next, the second one the token after that, and so on. The model then runs the token and the guesses in one
forward. What follows the token is drawn from its own logits as ever; if that is the first guess, the logits behind it
are already there, and give one more token, and so on. So what is said is what would be said without guesses, for every
way of drawing: each token takes one draw from the same logits.

Modules have caches of their own. At position i the k-th sees the (k-1)-th one's state there (the first the model's) and
token i + k, so it runs k tokens behind. The last k - 1 positions were run with guesses; when their tokens have been
decided, they are run again.

Legend: s tokens of a forward, h hidden, k depth of a module, from 1.
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
        self._before: dict[int, Tensor] = {}
        """Each depth's last states, as many as its depth."""

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
            start, self._before = 0, {}
            while request.end_reason is None:
                # The model may look no further than its context.
                guesses = self._guess(states, start, request.ids)[: self.cache.places - request.num_tokens]
                start = request.num_tokens - 1
                states = self._states([request.ids[-1], *guesses], start)
                yield self._take(request, states[:1])
                count = 1
                self.num_guesses += len(guesses)
                for guess in guesses:
                    if request.new_ids[-1] != guess or request.end_reason is not None:
                        break
                    self.num_right += 1
                    yield self._take(request, states[count : count + 1])
                    count += 1
                states = states[:count]

    def _states(self, tokens: Sequence[int], start: int) -> Tensor:
        """The model's states [s, 1, h] of tokens from a position on."""
        window = CacheWindow.looking_back(self.cache, [start], len(tokens))
        return cached_states(self.model, torch.tensor([list(tokens)], device=self.cache.device), window)

    def _take(self, request: Request, state: Tensor) -> NewText:
        """Draw the token that follows a state [1, 1, h]."""
        logits = self.model.logits(state)[0, :, : self.vocab_size]
        (token,) = draw_tokens(logits, [request])
        return NewText(request, accept(request, token, self.end_ids, self.cache.places))

    def _guess(self, states: Tensor, start: int, ids: Sequence[int]) -> list[int]:
        """What follows the tokens ``ids`` that have been decided: a guess of each module.

        Args:
            states: The model's, [s, 1, h], of positions from ``start`` on, up to the last but one of ``ids``.
            start: Where those of the last call ended; 0: a new request.
            ids: Prompt and answer.
        """
        known, end, first = list(ids), start + states.size(0), start
        for depth, module in enumerate(self.model.mtp.layers, start=1):
            found = self._run_module(module, depth, states, first, known[first + depth : end + depth])
            known.append(int(self.model.logits(found[-1:])[0, 0, : self.vocab_size].argmax()))
            states = found
            if start >= depth:
                # At this position the next module knew its last token from a guess only.
                first -= 1
                states = torch.cat((self._before[depth][:1], found))
            self._before[depth] = found[-depth:]
        return known[len(ids) :]

    def _run_module(self, module: Any, depth: int, states: Tensor, first: int, tokens: Sequence[int]) -> Tensor:
        """A module's states [s, 1, h] of positions from ``first`` on, of those one depth less and tokens ahead."""
        window = CacheWindow.looking_back(self.cache, [first], len(tokens))
        attention = attention_layers(self.model, with_prediction=True)
        own = len(self.model.decoder.layers) + depth - 1
        embedded = self.model.embedding(
            input_ids=torch.tensor([list(tokens)], device=self.cache.device), position_ids=None
        )
        with attached(attention[own : own + 1], window.layers()[own : own + 1]):
            return module(
                states,
                embedded,
                attention_mask=None,
                rotary_pos_emb=self.model.rotary_table(self.cache.places, window.positions),
            )
