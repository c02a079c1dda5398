"""Tasks of the lm-evaluation-harness (``lm-eval``), found, run and brought into plain figures."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError, DataError, GptoughtsError

_BOOTSTRAP_DRAWS = 1000
"""For standard errors without a formula; the harness's default of 100,000 takes minutes for three digits."""


@dataclass(frozen=True)
class TaskRequest:
    """What to run."""

    names: Sequence[str]
    """Tasks, groups or tags."""
    folder: Path | None = None
    """Of YAML files that describe further tasks; their paths are relative to it."""
    num_fewshot: int | None = None
    """None: the task's own."""
    limit: int | None = None
    """Questions per task; None: all."""
    gen_kwargs: str | None = None
    """``name=value,...`` in place of the tasks' own."""


@dataclass(frozen=True)
class TaskMetric:
    """One figure of one task."""

    task: str
    filter: str
    metric: str
    value: float | None
    standard_error: float | None
    """None where the harness has none."""
    num_questions: int | None
    num_fewshot: int | None
    version: str | None


@dataclass(frozen=True)
class TaskResults:
    """All figures."""

    metrics: list[TaskMetric]
    harness: dict[str, Any]
    """The harness's version and the tasks' configurations, JSON-able."""

    def as_json(self) -> list[dict[str, Any]]:
        """One object per figure."""
        return [dataclasses.asdict(metric) for metric in self.metrics]


def evaluate_tasks(model: Any, wanted: TaskRequest) -> TaskResults:
    """Run tasks.

    Args:
        model: A ``lm_eval_adapter.GptoughtsLM``.
        wanted: Which.
    Raises:
        ConfigError: unknown names (the nearest known ones are said).
        DataError: a task's description or data cannot be read; a question does not fit into the context.
    Collective: every rank of the world.
    """
    from lm_eval.evaluator import simple_evaluate

    # Its own processes for the bootstrap would be forks of a process with a device and threads of communication.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager = find_tasks(wanted.names, wanted.folder)
    # The harness gives results where LOCAL_RANK is 0 alone (evaluator.py:429, 0.4.13): the first rank of each host.
    found = simple_evaluate(
        model,
        tasks=_loaded(manager, wanted),
        num_fewshot=wanted.num_fewshot,
        limit=wanted.limit,
        gen_kwargs=wanted.gen_kwargs,
        task_manager=manager,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
        log_samples=False,
    )
    return TaskResults([], {}) if found is None else read_results(found)


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """A ``TaskManager`` that knows all the names.

    Raises:
        ConfigError: a name that it does not know.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        # Thousands of files are read for the harness's own: only where one may be meant.
        manager = TaskManager(include_path=folder)
    problems = []
    for name in names:
        if name in manager.all_tasks:
            continue
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists the harness's own"
        problems.append(f"tasks={name} (command line): no such task; {hint}")
    if problems:
        raise ConfigError(problems)
    return manager


def _loaded(manager: Any, wanted: TaskRequest) -> list[Any]:
    """The tasks with their data."""
    found: list[Any] = []
    with _inside(wanted.folder):
        for name in wanted.names:
            try:
                content = manager.load([name])
            except GptoughtsError:
                raise
            # Descriptions are anybody's YAML and Python, data comes through `datasets`: whatever they raise.
            except Exception as error:
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                raise DataError(f"task {name}: its description or data cannot be read: {reason[0]}") from error
            children = {child for names in content["group_map"].values() for child in names}
            found += [one for key, one in content["groups"].items() if key not in children]
            inside = {task.task_name for group in content["groups"].values() for task in group.get_all_tasks()}
            found += [task for key, task in content["tasks"].items() if key not in inside]
    return found


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Go there, where there is one: `datasets` takes a task's relative paths from the working directory."""
    with contextlib.chdir(folder) if folder is not None else contextlib.nullcontext():
        yield


def read_results(found: dict[str, Any]) -> TaskResults:
    """The harness's dictionary as figures."""
    metrics = []
    for task, values in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            metrics.append(
                TaskMetric(
                    task=task,
                    filter=filter_name,
                    metric=metric,
                    value=_number(value),
                    standard_error=_number(values.get(f"{metric}_stderr,{filter_name}")),
                    num_questions=counts.get("effective"),
                    num_fewshot=found.get("n-shot", {}).get(task),
                    version=None if found["versions"].get(task) is None else str(found["versions"][task]),
                )
            )
    harness = {"version": importlib.metadata.version("lm-eval"), "configs": _plain(found.get("configs", {}))}
    return TaskResults(metrics, harness)


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where it has none."""
    return float(value) if isinstance(value, int | float) else None


def _plain(value: Any) -> Any:
    """JSON-able: functions in a task's description become their names."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "__name__", str(value))
