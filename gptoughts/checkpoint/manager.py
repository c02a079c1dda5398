"""Saving and restoring a run on all ranks at once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gptoughts.checkpoint import layout, random_state
from gptoughts.checkpoint.identity import identity_differences
from gptoughts.checkpoint.portable import CheckpointReader, ShardContent
from gptoughts.engine.interface import Engine
from gptoughts.errors import CheckpointError
from gptoughts.parallel import groups

logger = logging.getLogger(__name__)


@dataclass
class PendingSave:
    """A checkpoint that this rank is writing, or has written, and that is not known to be the latest yet."""

    folder: Path
    """Its final name."""
    train_state: Mapping[str, Any]
    """Where the run stood."""
    _record: Future[layout.FileRecord]
    is_publishing: bool = False
    """Whether every rank has written its part and rank 0 makes a checkpoint of them."""
    _publication: Future[None] | None = None
    """On rank 0."""

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is done, well or not. Collective: none."""
        return self._record.done()

    @property
    def is_next_due(self) -> bool:
        """Whether this rank would not wait in the next of ``publish`` and ``finish``. Collective: none."""
        if not self.is_publishing:
            return self.is_written
        return self._publication is None or self._publication.done()

    def outcome(self) -> tuple[str | None, layout.FileRecord | None]:
        """Wait for this rank's part: what went wrong, or what was written. Collective: none."""
        try:
            return None, self._record.result()
        except OSError as error:
            return f"rank {dist.get_rank()}: {error}", None


@dataclass(frozen=True)
class CheckpointManager:
    """Checkpoints of one run.

    Args:
        run: The run's folder.
        keep_last: Newest checkpoints that stay; 0 keeps all.
        config_yaml: The resolved configuration, stored with every checkpoint.
        identity: What makes the model this one (family and shape); compared on resume.
        tokenizer: tokenizer.json to carry along (and tokenizer_config.json where it lies beside), if there is one.
        later_fields: What checkpoints of earlier versions do not say of their model, and what it was.
    """

    run: Path
    keep_last: int
    config_yaml: str
    identity: Mapping[str, Any]
    tokenizer: Path | None = None
    later_fields: Mapping[str, Any] = field(default_factory=dict)
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    """Copies that an asynchronous save writes from."""

    def save(self, engine: Engine, train_state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of the present step and make it the latest.

        Raises:
            CheckpointError: on every rank, where any rank could not write; what was written is removed and earlier
                checkpoints stay.
        Collective: every rank of the world.
        """
        return self.finish(self.begin(engine, train_state, is_asynchronous=False))

    def begin(self, engine: Engine, train_state: Mapping[str, Any], *, is_asynchronous: bool) -> PendingSave:
        """Write this rank's part of a checkpoint of the present step; :meth:`finish` has to follow.

        :meth:`publish` may come between the two, so that training goes on beside its work, too.

        One save at a time. Until it is finished the former checkpoint is the latest.

        Args:
            engine: Whose state.
            train_state: Where the run stands, with its ``step``.
            is_asynchronous: Copy the state, and write the copy in a thread while training goes on.
        Raises:
            CheckpointError: on every rank, where there can be no folder.
        Collective: every rank of the world.
        """
        folder = layout.step_folder(self.run, int(train_state["step"]))
        self._on_rank_zero(folder, lambda: layout.start_partial(folder))
        content = ShardContent(
            engine.state_fragments(),
            random_state.capture(),
            tensor_rank=groups.tensor_parallel_rank(),
            tensor_size=groups.tensor_parallel_size(),
        )
        file = layout.partial_folder(folder) / layout.shard_file(dist.get_rank())
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        if is_asynchronous:
            # Forward and backward change nothing of this state, so the copy is made beside them too.
            engine.before_next_update(writer.submit(content.copy, self._buffers).result)
        record = writer.submit(content.write, file)
        writer.shutdown(wait=not is_asynchronous)
        return PendingSave(folder, {**train_state, "engine": engine.scalar_state()}, record)

    def publish(self, pending: PendingSave) -> None:
        """Wait until every rank has written its part, then let a thread of rank 0 make the checkpoint the latest.

        Raises:
            CheckpointError: as :meth:`save`.
        Collective: every rank of the world.
        """
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, pending.outcome())
        self._raise_where_any(pending.folder, [found for found, _ in answers])
        records = {layout.shard_file(rank): record for rank, (_, record) in enumerate(answers)}
        if dist.get_rank() == 0:
            publisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-publisher")
            pending._publication = publisher.submit(self._publish, pending.folder, records, dict(pending.train_state))
            publisher.shutdown(wait=False)
        pending.is_publishing = True

    def finish(self, pending: PendingSave) -> Path:
        """Wait until the checkpoint is the latest.

        Raises:
            CheckpointError: as :meth:`save`.
        Collective: every rank of the world.
        """
        if not pending.is_publishing:
            self.publish(pending)
        publication = pending._publication
        self._on_rank_zero(pending.folder, lambda: publication.result() if publication is not None else None)
        return pending.folder

    def _publish(self, folder: Path, records: dict[str, layout.FileRecord], state: dict[str, Any]) -> None:
        partial = layout.partial_folder(folder)
        layout.write_atomically(partial / layout.CONFIG, self.config_yaml)
        layout.write_atomically(partial / layout.TRAIN_STATE, json.dumps(state, indent=2) + "\n")
        names = [layout.CONFIG, layout.TRAIN_STATE]
        if self.tokenizer is not None:
            beside = self.tokenizer.with_name(layout.TOKENIZER_CONFIG)
            for source, name in ((self.tokenizer, layout.TOKENIZER), (beside, layout.TOKENIZER_CONFIG)):
                if source.is_file():
                    shutil.copyfile(source, partial / name)
                    layout.sync_file(partial / name)
                    names.append(name)
        records = records | {name: layout.FileRecord.of(partial / name) for name in names}
        header = {
            "step": state["step"],
            "world_size": dist.get_world_size(),
            "layout": groups.layout(),
            "model": dict(self.identity),
        }
        layout.write_manifest(partial, records, header)
        layout.publish(folder, keep_last=self.keep_last)

    def _on_rank_zero(self, folder: Path, work: Callable[[], object]) -> None:
        """Run ``work`` on rank 0; all ranks learn whether it went well. Collective: every rank of the world."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                problem = [f"rank 0: {error}"]
        dist.broadcast_object_list(problem, src=0)
        self._raise_where_any(folder, problem)

    def _raise_where_any(self, folder: Path, problems: list[str | None]) -> None:
        found = [problem for problem in problems if problem]
        if not found:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(layout.partial_folder(folder), ignore_errors=True)
        kept = layout.list_checkpoints(self.run)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError([f"{folder}: could not be saved: {'; '.join(found)}; {last}"])

    def find(self, resume: str) -> CheckpointReader | None:
        """The checkpoint to resume from, verified; None: start anew.

        Raises:
            CheckpointError: on every rank: none at the path, all damaged, or of another model.
        Collective: every rank of the world.
        """
        problems: list[str] = []
        chosen: Path | None = None
        try:
            chosen = layout.first_good(layout.candidates(self.run, resume), self._damage_of, logger.warning)
        except CheckpointError as error:
            problems = error.problems
        if problems:
            raise CheckpointError(problems)
        if chosen is None:
            return None
        reader = CheckpointReader(chosen)
        if reader.manifest.get(layout.WEIGHTS_ONLY):
            raise CheckpointError(
                f"{chosen}: holds weights only, so no run can be resumed from it; start one with --init_from {chosen} "
                "and another --output_dir"
            )
        self._check_identity(reader)
        return reader

    def find_before(self, step: int) -> CheckpointReader | None:
        """The newest undamaged checkpoint of the run's folder from before ``step``; None: there is none.

        Collective: every rank of the world.
        """
        older = [found for found in layout.list_checkpoints(self.run)[::-1] if layout.step_of(found) < step]
        for folder in older:
            if not (damage := self._damage_of(folder)):
                return CheckpointReader(folder)
            logger.warning("damaged checkpoint: %s", "; ".join(damage))
        return None

    def _damage_of(self, folder: Path) -> list[str]:
        """Every rank checks its share of the files; all get all findings. Collective: every rank of the world."""
        found: list[str] = []
        try:
            files = layout.read_manifest(folder)["files"]
            mine = list(files)[dist.get_rank() :: dist.get_world_size()]
            found = [damage for name in mine if (damage := layout.find_damage(folder, name, files[name]))]
        except CheckpointError as error:
            found = error.problems if dist.get_rank() == 0 else []
        except OSError as error:
            found = [f"{folder}: {error}"]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return [damage for per_rank in everyone for damage in per_rank]

    def _check_identity(self, reader: CheckpointReader) -> None:
        saved = reader.manifest.get("model", {})
        problems = [
            f"{reader.folder}: is a checkpoint of another model: {name}={there!r} there, {here!r} here"
            for name, (there, here) in identity_differences(saved, self.identity, self.later_fields).items()
        ]
        if problems:
            raise CheckpointError([*problems, "use another --output_dir, or --resume none"])

    def restore(self, reader: CheckpointReader, engine: Engine, names: list[str]) -> dict[str, Any]:
        """Fill the engine and the random number generators from a checkpoint; returns its train_state.

        Raises:
            CheckpointError: names or shapes differ.
        Collective: every rank of the world.
        """
        state = json.loads((reader.folder / layout.TRAIN_STATE).read_text())
        reader.check_names(engine.state_fragments(), names=names)
        tensor_rank = groups.tensor_parallel_rank()
        tensor_size = groups.tensor_parallel_size()
        engine.load_state(
            lambda fragment: reader.fragment(fragment, tensor_rank=tensor_rank, tensor_size=tensor_size),
            state["engine"],
        )
        # Checkpoints of earlier versions do not say their layout, or not whether sequences were divided.
        same_world = reader.manifest["world_size"] == dist.get_world_size()
        written_by = {"context": 1, **reader.manifest.get("layout", groups.layout())}
        if same_world and written_by == groups.layout():
            states = reader.rng(dist.get_rank())
            if states:  # one that was divided anew has none
                random_state.restore(states)
        return state


def check_files_together(folder: Path) -> None:
    """Rank 0 reads all files of a checkpoint once; every rank learns what it found.

    Raises:
        CheckpointError: on every rank: names each damaged file.
    Collective: every rank of the world.
    """
    problems: list[list[str]] = [[]]
    if dist.get_rank() == 0:
        try:
            layout.check_files(folder)
        except CheckpointError as error:
            problems = [error.problems]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise CheckpointError(problems[0])
