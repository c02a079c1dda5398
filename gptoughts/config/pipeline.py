"""Which layers each pipeline stage holds, and what a layout's idle time is.

With P stages and V virtual ones the layers are cut into P V consecutive chunks, and chunk i belongs to stage i mod P:
each stage has V chunks, and a microbatch passes every stage V times (Narayanan et al., arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each chunk, in the order of the model; a valid layout is assumed."""
    if parallel.pipeline_layout is not None:
        return [int(count) for count in parallel.pipeline_layout.split(",")]
    chunks = parallel.pipeline * parallel.virtual_pipeline
    return [num_layers // chunks] * chunks


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[range]]:
    """For each stage its chunks' layers, counted from 0 over the whole model."""
    stages: list[list[range]] = [[] for _ in range(parallel.pipeline)]
    first = 0
    for chunk, count in enumerate(chunk_layers(num_layers, parallel)):
        stages[chunk % parallel.pipeline].append(range(first, first + count))
        first += count
    return stages


def bubble_fraction(parallel: ParallelConfig, num_microbatches: int) -> float:
    """Share of a step in which a stage waits for others, where all chunks take equally long.

    (P - 1) / V of a microbatch's time is lost at the ends, beside the work of M microbatches (arXiv:2104.04473,
    section 2.2): (P - 1) / (V M + P - 1) of the whole.
    """
    lost = parallel.pipeline - 1
    return lost / (parallel.virtual_pipeline * num_microbatches + lost)


def pipeline_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    """Whatever forbids the split of the layers, one line each."""
    parallel, num_layers = config.parallel, config.model.num_layers
    pipeline_is = f"parallel.pipeline={parallel.pipeline} ({sources['parallel.pipeline']})"
    virtual_is = f"parallel.virtual_pipeline={parallel.virtual_pipeline} ({sources['parallel.virtual_pipeline']})"
    if min(parallel.pipeline, parallel.virtual_pipeline, num_layers) < 1:
        return []
    if parallel.pipeline_layout is not None:
        return _layout_problems(parallel, num_layers, sources)
    if parallel.pipeline == 1:
        if parallel.virtual_pipeline > 1:
            return [f"{virtual_is}: interleaves the layers of several stages; needs parallel.pipeline of 2 or more"]
        return []
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if num_layers % chunks == 0:
        return []
    named = pipeline_is if parallel.virtual_pipeline == 1 else f"{pipeline_is} x {virtual_is}"
    if num_layers < chunks:
        return [f"{named}: model.num_layers={num_layers} leaves no layer for some of {chunks} stages"]
    return [
        f"{named}: model.num_layers={num_layers} is not divisible by {chunks}; choose a divisor, or say how many "
        f"layers each has: --parallel.pipeline_layout {suggested_layout(num_layers, chunks)}"
    ]


def suggested_layout(num_layers: int, chunks: int) -> str:
    """Nearly equal chunks; the last ones, which come before the output layer, are the smaller ones."""
    least, more = divmod(num_layers, chunks)
    return ",".join(str(least + (chunk < more)) for chunk in range(chunks))


def _layout_problems(parallel: ParallelConfig, num_layers: int, sources: Mapping[str, str]) -> list[str]:
    layout_is = f"parallel.pipeline_layout={parallel.pipeline_layout} ({sources['parallel.pipeline_layout']})"
    chunks = parallel.pipeline * parallel.virtual_pipeline
    words = (parallel.pipeline_layout or "").split(",")
    if parallel.pipeline == 1:
        return [f"{layout_is}: says how stages divide the layers; needs parallel.pipeline of 2 or more"]
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        return [f"{layout_is}: numbers of layers, 1 or more, are expected: {suggested_layout(num_layers, chunks)}"]
    if len(words) != chunks:
        return [
            f"{layout_is}: has {len(words)} numbers, parallel.pipeline={parallel.pipeline} x "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs {chunks}"
        ]
    if sum(map(int, words)) != num_layers:
        return [f"{layout_is}: adds up to {sum(map(int, words))}, not to model.num_layers={num_layers}"]
    return []


def microbatch_problems(config: ExperimentConfig, sources: Mapping[str, str], num_microbatches: int) -> list[str]:
    """The interleaved schedule sends microbatches round in groups of as many as there are stages."""
    parallel = config.parallel
    if parallel.virtual_pipeline == 1 or num_microbatches % parallel.pipeline == 0:
        return []
    return [
        f"parallel.virtual_pipeline={parallel.virtual_pipeline} ({sources['parallel.virtual_pipeline']}): the "
        f"{num_microbatches} microbatches of a step are not a multiple of parallel.pipeline={parallel.pipeline}; set "
        "train.gradient_accumulation_steps or train.global_batch_size"
    ]
