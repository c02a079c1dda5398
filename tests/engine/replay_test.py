"""Which of many non-finite tensors came first, and in which rows they hold what is not finite."""

from __future__ import annotations

import torch

from gptoughts.engine.replay import BACKWARD, FORWARD, Finding, NonFiniteWatch, bad_rows, first_of


def finding(phase: str, microbatch: int, depth: int, order: int) -> Finding:
    return Finding(phase, microbatch, depth, order, module="m", parameter=None, value="NaN", rows=())


def test_what_comes_first_in_the_models_order() -> None:
    forward, backward = finding(FORWARD, 1, 3, 90), finding(BACKWARD, 0, 3, 10)
    assert first_of([backward, forward]) is forward, "a bad forward explains every backward"
    early, late = finding(FORWARD, 1, 0, 99), finding(FORWARD, 1, 1, 2)
    assert first_of([late, early]) is early, "a later stage gets what an earlier one sends"
    front, end = finding(BACKWARD, 0, 0, 5), finding(BACKWARD, 0, 1, 50)
    assert first_of([front, end]) is end, "and in the backward the other way round"
    assert first_of([finding(BACKWARD, 1, 1, 1), end]) is end
    assert first_of([]) is None


def test_rows_of_the_microbatch() -> None:
    hidden = torch.zeros(5, 3, 2)
    hidden[4, 1, 0] = torch.inf
    assert bad_rows(hidden, 3) == (1,)
    losses = torch.zeros(3, 5)
    losses[2, 0] = losses[0, 4] = torch.nan
    assert bad_rows(losses, 3) == (0, 2)
    assert bad_rows(torch.full((7,), torch.nan), 3) == ()


def test_the_innermost_module_and_the_first_parameter_are_found() -> None:
    torch.manual_seed(0)
    inner, outer = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(inner, torch.nn.Sequential(outer))
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())

    def watched(rows: torch.Tensor, spoil: float) -> list[Finding]:
        with NonFiniteWatch([modules], parameters, [0], num_rows=2) as watch:
            watch.begin(0)
            output = model(rows)
            output.register_hook(lambda gradient: gradient * spoil)
            output.sum().backward()
        return watch.findings

    assert watched(torch.ones(2, 3, 4), 1.0) == []
    rows = torch.ones(3, 2, 4)
    rows[0, 1, 0] = torch.inf
    forward = first_of(watched(rows, 1.0))
    assert forward is not None
    assert (forward.phase, forward.module, forward.rows) == (FORWARD, "0", (1,))
    found = watched(torch.ones(3, 2, 4), float("nan"))
    assert {one.phase for one in found} == {BACKWARD}
    assert [one.parameter for one in found if one.parameter] == ["1.0.bias"]
    assert all(not module._forward_hooks for module in model.modules()), "hooks are taken off again"
