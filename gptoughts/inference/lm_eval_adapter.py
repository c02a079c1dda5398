"""Models of all families for the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

Importing this module enters the model class ``gptoughts`` into the harness's registry. It needs the package
``lm-eval`` (``pip install -e '.[eval]'``).

Every rank asks the same questions: the harness sees a world of one process, and requests are dealt to the
data-parallel ranks below it (``likelihood_scorer``, ``continuation``). So every rank has all results.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.continuation import Prompt, continue_texts, sampler_options
from gptoughts.inference.diffusion_likelihood import LikelihoodOptions
from gptoughts.inference.evaluation_texts import windows
from gptoughts.inference.likelihood import build_scorer, with_start
from gptoughts.inference.likelihood_scorer import Request
from gptoughts.inference.loading import LoadedModel, load_model
from gptoughts.inference.progress import progress_bar
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device as platform_device

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks call the length of an answer, the harness's own name first."""


@register_model("gptoughts")
class GptoughtsLM(TemplateLM):
    """A model of ours behind the harness's face.

    Args:
        checkpoint: A run, a checkpoint or a Hugging Face folder; or a model that is loaded already.
        batch_size: Sequences of the whole context that go through the model together.
        tensor_parallel: Ranks that divide each layer; what they leave of the world share the requests.
        method: Of masked diffusion: monte_carlo or chain_rule.
        num_samples: Of monte_carlo.
        seed: Of monte_carlo.
        truncate_prompts: Cut prompts that do not fit into the context from the left; else they are refused.
        precision: Of weights and products, fp32 or bf16.
        max_gen_toks: Tokens of an answer where the task does not say.
        device: What the harness was told; nothing but this process's device can be.
    Raises:
        GptoughtsError: whatever the user can mend.
    Collective: every rank of the world; makes its groups.
    """

    def __init__(
        self,
        checkpoint: str | LoadedModel,
        batch_size: int | str = 8,
        tensor_parallel: int = 1,
        method: str | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
        truncate_prompts: bool = False,
        precision: str | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.loaded = (
            checkpoint
            if isinstance(checkpoint, LoadedModel)
            else load_model(Path(checkpoint), precision=precision, tensor_size=int(tensor_parallel))
        )
        here = platform_device.current_device()
        if device is not None and device.split(":")[0] != here.type:
            raise ConfigError(f"device={device}: this process computes on {here}; leave it out")
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size={batch_size}: a number is needed")
        self.batch_size = int(batch_size)
        self._device = here
        self._truncates = truncate_prompts
        self._max_gen_toks = int(max_gen_toks)
        stated = {"method": method, "num_samples": num_samples, "seed": seed}
        given = {name: value for name, value in stated.items() if value is not None}
        self._scorer = build_scorer(
            self.loaded.model,
            self.loaded.config,
            batch_size=self.batch_size,
            diffusion=LikelihoodOptions(**given) if given else None,  # type: ignore[arg-type]
        )

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.loaded.context_tokens

    @property
    def eot_token_id(self) -> int:
        """What stands before a text, and ends one.

        Raises:
            DataError: the tokenizer has none.
        """
        if self.loaded.tokenizer.eod_id is None:
            raise DataError(f"{self.loaded.tokenizer.file}: has no end-of-text token, which stands before a text")
        return self.loaded.tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Tokens of a text; ours never add any of their own."""
        if options:
            raise ConfigError(f"tok_encode was given {options}; not supported")
        return self.loaded.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy answer) of each (context, continuation).

        Collective: every rank of the world, with the same requests.
        """
        found = super().loglikelihood(requests, disable_tqdm=True)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        scored = self._score([Request(prompt, answer) for _, prompt, answer in requests], "loglikelihood")
        return [(log_likelihood, is_greedy) for log_likelihood, is_greedy in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in nats.

        Next-token models: after the end-of-text token, in windows of the context that overlap only at the end.
        Masked diffusion: in rows of the context, each by itself.

        Collective: every rank of the world, with the same requests.
        """
        owners: list[int] = []
        parts: list[Request] = []
        for number, request in enumerate(requests):
            of_text = self._rolling(self.tok_encode(request.args[0]))
            parts += of_text
            owners += [number] * len(of_text)
        found = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._score(parts, "loglikelihood_rolling"), strict=True):
            found[number] += log_likelihood
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _rolling(self, ids: list[int]) -> list[Request]:
        if FAMILIES[self.loaded.config.model_type].is_causal:
            return windows([self.eot_token_id, *ids], self.max_length, self.max_length)
        if not self._scorer.needs_prompt:
            return [Request([], ids[start : start + self.max_length]) for start in range(0, len(ids), self.max_length)]
        step = self.max_length - 1  # the first place is given
        return [
            with_start(self.loaded.tokenizer, Request(ids[max(0, start - 1) : start], ids[start : start + step]))
            for start in range(0, len(ids), step)
        ]

    def _score(self, requests: Sequence[Request], what: str) -> list[tuple[float, bool]]:
        too_long = [one for one in requests if self._scorer.length(one) > self.max_length]
        if too_long and not self._truncates:
            raise DataError(
                f"{len(too_long)} of {len(requests)} requests do not fit into the model's context of {self.max_length} "
                f"tokens, the longest has {max(map(self._scorer.length, too_long))}; --truncate_prompts "
                "(truncate_prompts=True) cuts their prompts from the left"
            )
        fitting = [self._fitting(request) for request in requests]
        with self._progress(what, len(fitting)) as advance:
            return [(one.log_likelihood, bool(one.is_greedy)) for one in self._scorer.score(fitting, advance)]

    def _progress(self, what: str, count: int) -> Any:
        share = -(-count // groups.data_parallel_size())
        return progress_bar(what, share, is_quiet=groups.rank() != 0)

    def _fitting(self, request: Request) -> Request:
        """The request, with its prompt cut from the left as far as it has to be and can be."""
        excess = self._scorer.length(request) - self.max_length
        if excess <= 0:
            return request
        kept = max(len(request.prompt_ids) - excess, int(self._scorer.needs_prompt))
        return Request(request.prompt_ids[len(request.prompt_ids) - kept :], request.answer_ids)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The answer to each (context, options), up to the first of its stop strings; greedy unless it samples.

        Collective: every rank of the world, with the same requests.
        """
        prompts = [self._prompt(*request.args) for request in requests]
        with self._progress("generate_until", len(prompts)) as advance:
            found = continue_texts(self.loaded, prompts, batch_size=self.batch_size, advance=advance)
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _prompt(self, context: str, options: dict[str, Any]) -> Prompt:
        """A request as the samplers take it.

        Raises:
            DataError: a context that leaves no room for an answer.
            ConfigError: an option that the family's sampler does not have.
        """
        left = copy.deepcopy(options)
        lengths = [value for name in _LENGTH_NAMES if (value := left.pop(name, None)) is not None]
        max_new_tokens = int(lengths[0]) if lengths else self._max_gen_toks
        until = left.pop("until", None) or []
        is_sampled = bool(left.pop("do_sample", False))
        if not is_sampled:
            left["temperature"] = 0.0
        known = sampler_options(self.loaded.config.model_type)
        if unknown := [f"{name}={value}" for name, value in left.items() if name not in known]:
            raise ConfigError(
                f"a task generates with {', '.join(unknown)}: family {self.loaded.config.model_type} has no such "
                f"option; it has: {', '.join(known)}"
            )
        ids = self.tok_encode(context) or [self.eot_token_id]
        room = self.max_length - min(max_new_tokens, self.max_length // 2)
        if len(ids) > room and self._truncates:
            ids = ids[-room:]
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        return Prompt(ids, max_new_tokens, stop, tuple(sorted(left.items())))
