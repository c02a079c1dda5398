"""How likely a model finds answers to a prompt, for all families: texts in, :class:`Likelihood` out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.diffusion_likelihood import DiffusionScorer, LikelihoodOptions
from gptoughts.inference.likelihood_scorer import AutoregressiveScorer, Likelihood, LikelihoodScorer, Request
from gptoughts.inference.row_scorer import RowScorer
from gptoughts.models.llada.config import DiffusionFields
from gptoughts.models.registry import FAMILIES


def build_scorer(
    model: nn.Module,
    config: ExperimentConfig,
    *,
    batch_size: int,
    diffusion: LikelihoodOptions | None = None,
    checks_greedy: bool = True,
    context_tokens: int | None = None,
) -> LikelihoodScorer:
    """What scores requests with a model of any family.

    Args:
        model: In evaluation mode; the groups of its layout exist.
        config: The run that it is from.
        batch_size: Sequences of the whole context that go through it together; of shorter ones there are more.
        diffusion: For masked diffusion; unset: the defaults.
        checks_greedy: Whether ``Likelihood.is_greedy`` is wanted; for masked diffusion it costs further forwards.
        context_tokens: Longest sequence that the model may see; unset: that of its training.
    Raises:
        ConfigError: options that cannot be, or that the family does not have.
    """
    shape, family = config.model.filled(), FAMILIES[config.model_type]
    problems = [f"batch_size={batch_size}: at least 1"] if batch_size < 1 else []
    if diffusion is not None:
        problems += diffusion.problems()
        if family.is_causal:
            problems.append(
                f"method={diffusion.method}: is of masked diffusion; the likelihood of family {family.name} is exact"
            )
    if problems:
        raise ConfigError(problems)
    context_tokens = context_tokens or config.block_size or shape.seq_length
    rows = RowScorer(
        model,
        num_entries=shape.vocab_size,
        is_causal=family.is_causal,
        batch_tokens=batch_size * context_tokens,
    )
    if family.is_causal:
        return AutoregressiveScorer(rows, context_tokens=context_tokens, checks_greedy=checks_greedy)
    assert isinstance(shape, DiffusionFields)
    assert shape.mask_token_id is not None
    return DiffusionScorer(
        rows,
        options=diffusion or LikelihoodOptions(),
        mask_token_id=shape.mask_token_id,
        is_shifted=shape.is_shifted,
        context_tokens=context_tokens,
        checks_greedy=checks_greedy,
    )


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> Request:
    """Tokens of a prompt and of the answer after it.

    Spaces at the prompt's end go to the answer, where they are part of its first word's token. Where no token crosses
    the border, the two are cut from the tokens of the whole text; else each is encoded by itself.
    """
    stripped = prompt.rstrip()
    answer = prompt[len(stripped) :] + answer
    whole, prompt_ids = tokenizer.encode(stripped + answer), tokenizer.encode(stripped)
    if whole[: len(prompt_ids)] == prompt_ids:
        return Request(prompt_ids, whole[len(prompt_ids) :])
    return Request(prompt_ids, tokenizer.encode(answer))


def log_likelihood(
    scorer: LikelihoodScorer, tokenizer: Tokenizer, prompt: str, answers: Sequence[str]
) -> list[Likelihood]:
    """How likely the model finds each answer after the prompt.

    An empty prompt stands for the begin of a text: the token that ends one takes its place, where one is needed.

    Raises:
        DataError: the two do not fit into the context, or the prompt is empty and the tokenizer has no end of text.
    Collective: every rank of the world.
    """
    requests = [encode_pair(tokenizer, prompt, answer) for answer in answers]
    if scorer.needs_prompt:
        requests = [with_start(tokenizer, request) for request in requests]
    return scorer.score(requests)


def with_start(tokenizer: Tokenizer, request: Request) -> Request:
    """The request, with the end-of-text token as its prompt where it has none.

    Raises:
        DataError: the tokenizer has no such token.
    """
    if len(request.prompt_ids):
        return request
    if tokenizer.eod_id is None:
        raise DataError("a prompt is empty, and the tokenizer has no end-of-text token to begin with; give one token")
    return Request([tokenizer.eod_id], request.answer_ids)
