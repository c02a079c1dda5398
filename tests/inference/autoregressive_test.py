"""Many requests at once through a cache, beside each of them alone without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptoughts.inference.autoregressive import CONTEXT, END, LENGTH, BatchGenerator, Request
from gptoughts.inference.sampling import Sampler
from gptoughts.inference.sampling_options import SamplingOptions
from tests.distributed import run_distributed
from tests.models.kv_cache_test import PLACES, build

VOCABULARY = 100
PROMPT_LENGTHS = (3, 21, 1, 9, 14, 30)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def options(number: int) -> SamplingOptions:
    """Requests that differ: greedy, drawn, penalized, long and short."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0, "max_new_tokens": 9},
        {"temperature": 0.7, "top_k": 20, "seed": 3, "max_new_tokens": 4},
        {"temperature": 0, "repetition_penalty": 1.3, "max_new_tokens": 12},
        {"temperature": 1.1, "top_p": 0.9, "seed": 4, "max_new_tokens": 1},
    )
    return SamplingOptions(**kinds[number % len(kinds)])


@torch.inference_mode()
def alone(model: Any, prompt: list[int], chosen: SamplingOptions, end_ids: frozenset[int]) -> list[int]:
    """A forward of everything for each token."""
    sampler, ids = Sampler(chosen), list(prompt)
    while len(ids) - len(prompt) < chosen.max_new_tokens and len(ids) < PLACES:
        token = sampler.draw(model(torch.tensor([ids]))[0, -1, :VOCABULARY], ids)
        if token in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def generator_of(model: Any, rows: int, prefill_tokens: int = 1024, end_ids: tuple[int, ...] = ()) -> BatchGenerator:
    return BatchGenerator(
        model,
        vocab_size=VOCABULARY,
        context_tokens=PLACES,
        end_ids=end_ids,
        rows=rows,
        prefill_tokens=prefill_tokens,
    )


def queue_beside_each_alone(name: str, rows: int, prefill_tokens: int, tensor: int = 1) -> tuple[Any, Any]:
    model = build(name, tensor)
    requests = [Request(prompt, options(number)) for number, prompt in enumerate(prompts())]
    ends = (11, 12, 13, 14, 15, 16)
    for _ in generator_of(model, rows, prefill_tokens, ends).run(iter(requests)):
        pass
    expected = [alone(model, request.prompt_ids, request.options, frozenset(ends)) for request in requests]
    return [request.new_ids for request in requests], expected


@pytest.mark.parametrize(
    ("name", "rows", "prefill_tokens", "tensor"),
    [("gpt", 1, 1024, 1), ("gpt", 4, 8, 1), ("mla", 3, 64, 1), ("deepseek", 2, 1024, 1), ("mla", 3, 64, 2)],
)
def test_a_queue_says_what_each_request_says_alone(name: str, rows: int, prefill_tokens: int, tensor: int) -> None:
    for found, expected in run_distributed(queue_beside_each_alone, tensor, name, rows, prefill_tokens, tensor):
        assert found == expected
        assert {len(answer) for answer in found} != {len(found[0])}, "requests that end at different times"


def events() -> list[Any]:
    """(how requests were taken from a lazy queue, why each ended, bytes of what a second run leaves)."""
    model = build("gpt")
    taken: list[int] = []

    def queue(requests: list[Request]) -> Iterator[Request]:
        for number, request in enumerate(requests):
            taken.append(number)
            yield request

    lengths = (5, 2, 3, 60)
    requests = [Request([1, 2], SamplingOptions(temperature=0, max_new_tokens=length)) for length in lengths]
    generator = generator_of(model, rows=2)
    order: list[list[int]] = []
    for event in generator.run(queue(requests)):
        if event.request.end_reason is not None:
            order.append([requests.index(event.request), len(taken)])
    answers = [request.new_ids for request in requests]
    first = answers[0][1]
    ended = Request([1, 2], SamplingOptions(temperature=0, max_new_tokens=5))
    list(generator_of(model, rows=2, end_ids=(first,)).run([ended]))
    return [order, [request.end_reason for request in requests], answers, ended.new_ids, ended.end_reason]


def test_a_request_is_taken_when_a_row_is_free() -> None:
    ((order, reasons, answers, ended, reason),) = run_distributed(events, 1)
    assert order == [[1, 2], [2, 3], [0, 4], [3, 4]]
    assert reasons == [LENGTH, LENGTH, LENGTH, CONTEXT]
    assert [len(answer) for answer in answers] == [5, 2, 3, PLACES - 2]
    assert ended == answers[0][:1], "the end token is no part of the answer"
    assert reason == END


def neighbours() -> list[list[int]]:
    model = build("gpt")
    chosen = SamplingOptions(temperature=1.0, seed=5, max_new_tokens=8)
    found = []
    for others in (0, 3):
        requests = [Request(prompts()[0], chosen)]
        requests += [Request(prompts()[n + 1], SamplingOptions(seed=n, max_new_tokens=6)) for n in range(others)]
        list(generator_of(model, rows=4).run(requests))
        found.append(requests[0].new_ids)
    return found


def test_neighbours_do_not_change_what_a_seed_draws() -> None:
    ((by_itself, among_others),) = run_distributed(neighbours, 1)
    assert by_itself == among_others
    assert len(set(by_itself)) > 2


def refusals() -> list[str]:
    generator = generator_of(build("gpt"), rows=2)
    said = []
    for prompt in ([], [1] * PLACES):
        with pytest.raises(ValueError, match="tokens: 1 to 39 have room") as caught:
            list(generator.run([Request(prompt, SamplingOptions())]))
        said.append(str(caught.value))
    left = generator.run([Request([1], SamplingOptions(max_new_tokens=5))])
    next(left)
    left.close()
    again = Request([1, 2], SamplingOptions(max_new_tokens=5, temperature=0))
    list(generator.run([again]))
    return [*said, str(len(again.new_ids))]


def test_prompts_that_cannot_be_continued_and_a_run_that_is_left() -> None:
    ((empty, long, again),) = run_distributed(refusals, 1)
    assert empty.startswith("a prompt of 0")
    assert long.startswith("a prompt of 40")
    assert again == "5"
