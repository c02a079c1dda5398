"""Sampling from masked-diffusion models: restore the masks of a row, block after block.

A row is what is given and masks: a prompt with masks after it, or a text with holes. Its masks are divided from left to
right into blocks; a block of M masks is restored in steps, of which each predicts all its masks and keeps some
predictions (``remasking``), and what was kept never changes (LLaDA, arXiv:2502.09992, section 2.4 and appendix A.3:
semi-autoregressive remasking). Where the number of steps is fixed, S for B blocks, step i of S' = S / B keeps
floor(M / S') of them, and one more if i < M mod S'.

Rows of a batch are of any length; each ends as it would alone.

Legend: b rows of the batch, r those of a step, s sequence, n masks of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.denoiser import Denoiser, Rows
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.loading import LoadedModel
from gptoughts.inference.remasking import SpecialTokens, choose, predict
from gptoughts.models.llada.config import DiffusionFields


@dataclass(frozen=True)
class Kept:
    """What a step restored."""

    rows: list[int]
    """Row in the batch of each."""
    positions: list[int]
    """Position in its row."""
    tokens: list[int]
    confidences: list[float]
    """Probability that the model gave it (random remasking: what it drew)."""


@dataclass(frozen=True)
class Restored:
    """A row without masks; one that was left at its end has that end in all places after it."""

    tokens: list[int]
    """The whole row."""
    num_given: int
    """Tokens before the first mask."""

    def answer(self, special: SpecialTokens) -> list[int]:
        """What stands from the first mask on, without an end and what is after it."""
        tokens = self.tokens[self.num_given :]
        cuts = [tokens.index(end) for end in special.ends() if end in tokens]
        return tokens[: min(cuts, default=len(tokens))]


def continuation(prompt_ids: Sequence[int], num_masks: int, special: SpecialTokens) -> list[int]:
    """A row that goes on after a prompt.

    Raises:
        DataError: the prompt has masks of its own.
    """
    if special.mask in prompt_ids:
        where = list(prompt_ids).index(special.mask)
        raise DataError(
            f"prompt: token {where} is the mask, which is what an answer is made of; fill holes with --infill"
        )
    return [*prompt_ids, *[special.mask] * num_masks]


class DiffusionSampler:
    """Restores rows with one model.

    Args:
        model: Maps tokens [b, s] to logits at selected positions (``LanguageModel.forward``), looking both ways.
        special: Ids.
        vocab_size: Entries of the tokenizer.
        context_tokens: Sequence length that the model was trained with.
        is_shifted: The output at position i is about token i + 1.
    """

    def __init__(
        self,
        model: nn.Module,
        special: SpecialTokens,
        *,
        vocab_size: int,
        context_tokens: int,
        is_shifted: bool = False,
    ) -> None:
        self.model = model
        self.special = special
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self.is_shifted = is_shifted
        self.num_forwards = 0
        """Forwards of the model that the last call took."""

    def problems(self, row: Sequence[int], name: str = "row") -> list[str]:
        """What makes a row impossible to restore, one line each."""
        found = []
        num_masks = list(row).count(self.special.mask)
        if len(row) > self.context_tokens:
            found.append(
                f"{name}: {len(row) - num_masks} tokens and {num_masks} masks are {len(row)}, more than the model's "
                f"context of {self.context_tokens}"
            )
        if not num_masks:
            found.append(f"{name}: has no mask, so there is nothing to restore")
        if self.is_shifted and row and row[0] == self.special.mask:
            found.append(
                f"{name}: begins with a mask, but this model (is_shifted) restores a token from the one before it; "
                "give at least one token"
            )
        return found

    def option_problems(self, options: DiffusionOptions) -> list[str]:
        """Options about tokens that the model has not, one line each."""
        found = []
        if options.suppress_eos and self.special.eos is None:
            found.append("suppress_eos=True: the model has no end-of-text token")
        if options.defer_ends and not self.special.ends():
            found.append("defer_ends=True: the model has neither an end-of-text nor an end-of-turn token")
        return found

    def restore(
        self,
        rows: Sequence[Sequence[int]],
        options: DiffusionOptions,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[Kept], None] | None = None,
    ) -> list[Restored]:
        """Restore the masks of every row.

        Args:
            rows: Token ids with the mask token where one is to be restored.
            options: How; blocks and steps are those of each row's own number of masks.
            seeds: One for each row; unset: ``options.seed`` for all.
            on_step: Called after each step with what it restored.

        Raises:
            ConfigError: the options cannot be, or not for so many masks; says all that is wrong.
            DataError: a row cannot be restored; says all that is wrong.
        Collective: tensor-parallel group, whose ranks pass the same arguments.
        """
        restoration = self.start(rows, options, seeds=seeds)
        for kept in restoration.steps():
            if on_step is not None:
                on_step(kept)
        self.num_forwards = restoration.denoiser.num_forwards
        return restoration.results()

    def start(
        self, rows: Sequence[Sequence[int]], options: DiffusionOptions, *, seeds: Sequence[int] | None = None
    ) -> Restoration:
        """The same, step by step; arguments and errors as of :meth:`restore`."""
        counts = sorted({list(row).count(self.special.mask) for row in rows})
        wrong = self.option_problems(options) + [problem for count in counts for problem in options.problems(count)]
        if wrong:
            raise ConfigError(list(dict.fromkeys(wrong)))
        problems = [problem for i, row in enumerate(rows) for problem in self.problems(row, f"row {i}")]
        if problems:
            raise DataError(problems)
        return Restoration(self, rows, options, [options.seed] * len(rows) if seeds is None else seeds)


def build_sampler(loaded: LoadedModel) -> DiffusionSampler:
    """The sampler of a loaded model of the family ``llada``.

    Raises:
        DataError: its tokenizer has no mask token.
    """
    shape, tokenizer = loaded.config.model.filled(), loaded.tokenizer
    assert isinstance(shape, DiffusionFields)
    assert shape.mask_token_id is not None
    if tokenizer.backend.id_to_token(shape.mask_token_id) is None:
        raise DataError(
            f"{loaded.checkpoint}: its tokenizer has no mask token, which the model has under id "
            f"{shape.mask_token_id}; add it as a special token of that id (a checkpoint of a run carries such a copy)"
        )
    known = tokenizer.special_ids()
    eos = known.get("eos") if shape.eos_token_id is None else shape.eos_token_id
    eot = known.get("eot") if shape.eot_token_id is None else shape.eot_token_id
    return DiffusionSampler(
        loaded.model,
        SpecialTokens(shape.mask_token_id, eos, eot),
        vocab_size=tokenizer.vocab_size,
        context_tokens=loaded.config.block_size or shape.seq_length,
        is_shifted=shape.is_shifted,
    )


class Restoration:
    """Rows on their way; made by :meth:`DiffusionSampler.start`."""

    def __init__(
        self,
        sampler: DiffusionSampler,
        rows: Sequence[Sequence[int]],
        options: DiffusionOptions,
        seeds: Sequence[int],
    ) -> None:
        assert len(seeds) == len(rows), "a seed for each row"
        self.options, self.special = options, sampler.special
        device = next(sampler.model.parameters()).device
        self.tokens, self.lengths = _padded(rows, device)
        self.is_mask = (self.tokens == self.special.mask) & (
            torch.arange(self.tokens.size(1), device=device) < self.lengths[:, None]
        )
        self.is_given = ~self.is_mask  # also what lies beyond the ends
        counts = self.is_mask.sum(1).tolist()
        lengths = torch.tensor([options.filled_block_length(count) for count in counts], device=device)
        self.block_of = ((self.is_mask.cumsum(1) - 1) // lengths[:, None]).masked_fill(self.is_given, -1)
        self.steps_per_block = torch.tensor([options.steps_per_block(count) for count in counts], device=device)
        self.num_blocks = max((options.num_blocks(count) for count in counts), default=0)
        self.is_left = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.numbers = list(range(len(rows)))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.denoiser = Denoiser(
            sampler.model,
            sampler.special,
            vocab_size=sampler.vocab_size,
            is_shifted=sampler.is_shifted,
            cfg_scale=options.cfg_scale,
            cache_shape=None if options.cache == "none" else (len(rows), self.tokens.size(1)),
        )

    @torch.no_grad()
    def steps(self) -> Iterator[Kept]:
        """Take one step after the other; what each restored. Collective: tensor-parallel group."""
        for block in range(self.num_blocks):
            yield from self._restore_block(block)

    def _restore_block(self, block: int) -> Iterator[Kept]:
        """All steps of a block, of the rows that have one and were not left."""
        is_block = self.block_of == block
        total, steps = is_block.sum(1), self.steps_per_block
        is_window = self._window(is_block)
        was_mask = self.is_mask.clone()
        step = 0
        while (wanted := self._masks(block)).any():
            index = wanted.any(1).nonzero().squeeze(1)
            rows = Rows(self.tokens, self.lengths, self.is_given, self.numbers).at(index)
            wanted = wanted[index, : rows.tokens.size(1)]
            if self.options.cache == "none" or step == 0:
                logits = self.denoiser.logits(rows, wanted)
            else:
                # Where only masks are run: those that the step before restored have not been run as what they are.
                is_run = is_block & was_mask if self.options.cache == "delayed" else is_window
                logits = self.denoiser.window_logits(rows, wanted, is_run[index, : rows.tokens.size(1)])
            was_mask = self.is_mask.clone()
            quota = total // steps + (step < total % steps)
            yield self._keep(index, wanted, logits, quota[index])
            step += 1

    def _window(self, is_block: Tensor) -> Tensor:
        """bool [b, s]: from a block's first position to its last one, or with ``cache="prefix"`` to the row's end."""
        positions = torch.arange(is_block.size(1), device=is_block.device)
        starts = is_block.int().argmax(1)
        ends = self.lengths
        if self.options.cache == "dual":
            ends = positions.masked_fill(~is_block, 0).max(1).values + 1
        return (positions >= starts[:, None]) & (positions < ends[:, None])

    def _masks(self, block: int) -> Tensor:
        """bool [b, s]: masks of a block that are still to be restored."""
        return self.is_mask & (self.block_of == block) & ~self.is_left[:, None]

    def _keep(self, index: Tensor, wanted: Tensor, logits: Tensor, quota: Tensor) -> Kept:
        """Write the best of the predictions that logits [n, v] at the wanted positions (bool [r, s]) give."""
        generators = [self.generators[i] for i in index.tolist()]
        tokens, confidences = predict(logits, wanted.sum(1).tolist(), self.options, self.special, generators)
        everywhere = torch.full(wanted.shape, -torch.inf, dtype=torch.float64, device=wanted.device)
        is_kept = choose(everywhere.masked_scatter(wanted, confidences), self.options, quota)[wanted]
        row, position = wanted.nonzero(as_tuple=True)
        row, position, tokens = index[row[is_kept]], position[is_kept], tokens[is_kept]
        self.tokens[row, position] = tokens
        self.is_mask[row, position] = False
        if self.options.stop_at_end:
            self._leave_finished()
        return Kept(row.tolist(), position.tolist(), tokens.tolist(), confidences[is_kept].tolist())

    def _leave_finished(self) -> None:
        """Leave rows whose answer has an end with no mask before it."""
        self.is_left |= (self._ends() & (self.is_mask.cumsum(1) == 0)).any(1)

    def _ends(self) -> Tensor:
        """bool [b, s]: restored ends of rows whose masks are followed by nothing."""
        positions = torch.arange(self.tokens.size(1), device=self.tokens.device)
        num_given_after = (self.is_given & (positions < self.lengths[:, None])).flip(1).cumsum(1).flip(1)
        is_answer = ~self.is_given & (num_given_after == 0)
        is_end = torch.zeros_like(is_answer)
        for end in self.special.ends():
            is_end |= self.tokens == end
        return is_end & is_answer & ~self.is_mask

    def results(self) -> list[Restored]:
        """The rows; one that was left has its end in all places after it."""
        found = []
        ends = self._ends()
        for row, length, is_given, is_left, is_end in zip(
            *(x.tolist() for x in (self.tokens, self.lengths, self.is_given, self.is_left, ends)), strict=True
        ):
            tokens = row[:length]
            if is_left:
                end = is_end.index(True)
                tokens[end:] = [tokens[end]] * (length - end)
            found.append(Restored(tokens, is_given.index(False)))
        return found


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [b, s] with zeros beyond the ends, and the lengths int64 [b]."""
    longest = max((len(row) for row in rows), default=0)
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)
    return tokens.view(len(rows), longest), torch.tensor([len(row) for row in rows], device=device)
