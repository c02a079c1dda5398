"""``launchers/pretrain.py``, of whose ranks one kills itself (-9) at a moment that the environment names.

``DEATH=MOMENT:RANK:STEP``: in the second forward of the step, ahead of its update, half way through writing this
rank's part of its checkpoint, or (``publish``, rank 0 alone) when all parts are written.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

MOMENTS = ("forward", "update", "write", "publish")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def plan_death(moment: str, step: int) -> None:
    """Lay the trap in this process."""
    from gptoughts.checkpoint import layout, portable
    from gptoughts.engine.deepspeed_engine import TrainEngine
    from gptoughts.engine.zero_engine import ZeroEngine
    from gptoughts.models.language_model import LanguageModel

    at = {"step": 0, "forwards": 0}
    train_step = TrainEngine.train_step

    def counted(self: TrainEngine, *args: Any, **options: Any) -> Any:
        at.update(step=at["step"] + 1, forwards=0)
        return train_step(self, *args, **options)

    def before(function: Callable[..., Any], is_time: Callable[..., bool]) -> Callable[..., Any]:
        def trapped(*args: Any, **options: Any) -> Any:
            if is_time(*args):
                die()
            return function(*args, **options)

        return trapped

    def second_forward(*_: Any) -> bool:
        at["forwards"] += 1
        return at["step"] == step and at["forwards"] == 2

    def half_a_file(path: Any, headers: Any, read: Any, **options: Any) -> Any:
        record = write_file(path, headers, read, **options)
        if path.parent.name.startswith(layout.step_folder(path.parents[2], step).name):
            os.truncate(path, path.stat().st_size // 2)
            die()
        return record

    write_file = portable.write_file
    TrainEngine.train_step = counted  # type: ignore[method-assign]
    if moment == "forward":
        LanguageModel.forward = before(LanguageModel.forward, second_forward)  # type: ignore[method-assign]
    elif moment == "update":
        ZeroEngine.step = before(ZeroEngine.step, lambda *_: at["step"] == step)  # type: ignore[method-assign]
    elif moment == "write":
        portable.write_file = half_a_file  # type: ignore[assignment]
    else:
        layout.publish = before(layout.publish, lambda folder: layout.step_of(folder) == step)


if __name__ == "__main__":
    from gptoughts.errors import run_main
    from gptoughts.training.pretrain import main

    moment, rank, step = os.environ["DEATH"].split(":")
    assert moment in MOMENTS
    if os.environ["RANK"] == rank:
        plan_death(moment, int(step))
    run_main(main)
