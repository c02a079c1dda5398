"""``--init_from``: weights of another model into a fresh engine; optimizer, step and data start from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.adaptation import MULTI_TOKEN_PREDICTION, VOCABULARY_MATRICES, Adaptation, read_adaptation
from gptoughts.checkpoint.huggingface.formats import is_huggingface
from gptoughts.checkpoint.huggingface.weights import HuggingFaceWeights
from gptoughts.checkpoint.manager import check_files_together
from gptoughts.checkpoint.portable import BUFFER, WEIGHT, CheckpointReader
from gptoughts.config.model import ModelConfig
from gptoughts.engine.interface import Engine, StateFragment
from gptoughts.parallel import groups


def load_initial_weights(path: Path, engine: Engine, names: Iterable[str], model: ModelConfig) -> Path:
    """Fill the engine's weights and buffers (biases of routers); moments and counters stay as they are.

    Args:
        path: A Hugging Face folder, a run, or a checkpoint.
        engine: Freshly built.
        names: Global parameter names of its model.
        model: Its shape.
    Returns:
        The folder that was read.
    Raises:
        CheckpointError: on every rank: damaged, or other names and shapes than this model's.
    Collective: every rank of the world.
    """
    adaptation = read_adaptation(path, model)
    source, folder = _open(path, list(names), adaptation)
    tensor_rank, tensor_size = groups.tensor_parallel_rank(), groups.tensor_parallel_size()

    def read(fragment: StateFragment) -> Tensor:
        if fragment.kind not in (WEIGHT, BUFFER) or fragment.initial is not None:
            return fragment.tensor
        if adaptation is not None and fragment.name in VOCABULARY_MATRICES:
            return adaptation.fragment(source.full(fragment.name), fragment, tensor_rank, tensor_size)
        return source.fragment(fragment, tensor_rank=tensor_rank, tensor_size=tensor_size)

    engine.load_state(read, engine.scalar_state())
    return folder


def _open(
    path: Path, names: list[str], adaptation: Adaptation | None
) -> tuple[HuggingFaceWeights | CheckpointReader, Path]:
    def expected(there: list[str]) -> list[str]:
        """Names that the source should have: its heads of later tokens are left behind by an adapted model."""
        left = [name for name in there if name.startswith(MULTI_TOKEN_PREDICTION)] if adaptation is not None else []
        return [*names, *left]

    if is_huggingface(path):
        weights = HuggingFaceWeights(path)
        weights.check_names(expected(weights.names()))
        return weights, path
    folder = layout.locate(path)
    check_files_together(folder)
    reader = CheckpointReader(folder)
    reader.check_names([], names=expected(reader.names()))
    return reader, folder
