"""Switches FP8 on in a model that stands: which products, under which names, and what moves their scales on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.fp8 import is_fp8_state, is_kept, unmatched
from gptoughts.errors import ConfigError
from gptoughts.models.grouped_experts import GroupedExperts
from gptoughts.models.parameter_names import globally_named
from gptoughts.parallel import groups
from gptoughts.precision import te_backend
from gptoughts.precision.amax_report import kept_words
from gptoughts.precision.backend import choose_backend
from gptoughts.precision.fp8_linear import ColumnParallelLinear, RowParallelLinear
from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import ScalingRegion, ScalingState, initial_of

EXPERT_PRODUCTS = ("linear_fc1", "linear_fc2")


class Fp8Products:
    """The products of one chunk that can run in FP8, and those that do; watches every call of the chunk.

    Linear layers are Transformer Engine's or emulated, as the backend says; experts' products are always emulated.

    Args:
        model: The chunk.
        config: A run with FP8 on.
        backend: ``te`` or ``emulated``.
    """

    def __init__(self, model: Any, config: ExperimentConfig, backend: str) -> None:
        self._recipe = DelayedScaling.of(config.fp8)
        self._switches = _switches(model)
        self._te: te_backend.TeLinears | None = None
        self.states: dict[str, ScalingState] = {}
        """Emulated ones, by their global names."""

        words = kept_words(config.fp8)

        def stays_out(name: str) -> bool:
            return is_kept(name, words, config.model.num_layers)

        self.names = list(self._switches)
        """Every product that can run in FP8, by its global name."""
        if backend == "te":
            layers = te_backend.linear_layers(globally_named(model, model.named_modules()))
            self.names += layers
            self._te = te_backend.TeLinears(layers, stays_out, model.config)
        for name, (enable, _) in self._switches.items():
            if not stays_out(name):
                self.states[name] = enable(self._recipe)
        self._region = self._new_region()
        self._running = ExitStack()
        model.register_forward_pre_hook(self._begin_forward)
        # Not where a forward raises: the reduction at the end would wait for ranks that did not get there.
        model.register_forward_hook(self._end_forward)
        model.decoder.layers[0].register_forward_pre_hook(self._watch_backward, with_kwargs=True)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward of one microbatch. Collective: the amax group."""
        with ExitStack() as stack:
            for part in (self._te, self._region):
                if part is not None:
                    stack.enter_context(part.forward())
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Live histories and scales, ``NAME.fp8.scale_fwd`` and so on: the same names with both backends."""
        by_product = {name: state.states() for name, state in self.states.items()}
        if self._te is not None:
            by_product |= self._te.states()
        return {f"{name}.fp8.{key}": tensor for name, found in by_product.items() for key, tensor in found.items()}

    @property
    def running(self) -> list[str]:
        """Products that run in FP8 now, by their global names."""
        return [*self.states, *(self._te.layers if self._te is not None else {})]

    def fall_back(self, should_leave: Callable[[str], bool]) -> list[str]:
        """Take products out of FP8, between two steps; returns their names. The same on every rank of the amax group.

        Args:
            should_leave: Says so of a product's global name.
        """
        te_layers = self._te.layers if self._te is not None else {}
        leaving = [name for name in self.running if should_leave(name)]
        for name in leaving:
            if self._te is not None and name in te_layers:
                self._te.fall_back(name)
            else:
                self._switches[name][1]()
                del self.states[name]
        self._region = self._new_region()
        return leaving

    def shape_problems(self, rows: int) -> list[str]:
        """A line for each product that the backend cannot multiply, of ``rows`` tokens on a rank."""
        return te_backend.shape_problems(self._te.layers, rows) if self._te is not None else []

    def _begin_forward(self, *_: Any) -> None:
        self._running = ExitStack()
        self._running.enter_context(self.forward())

    def _end_forward(self, *_: Any) -> None:
        self._running.close()

    def _new_region(self) -> ScalingRegion | None:
        if not self.states:
            return None
        return ScalingRegion(list(self.states.values()), self._recipe, groups.amax_reduction_group())

    def _watch_backward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._region is None:
            return None
        if args:
            return (self._region.end_of_backward(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._region.end_of_backward(kwargs["hidden_states"])}


def prepare_fp8(transformer_config: Any, config: ExperimentConfig) -> None:
    """What megatron-core's configuration has to say before modules are made from it; nothing without FP8."""
    if config.use_fp8 and choose_backend(config).name == "te":
        te_backend.configure(transformer_config, DelayedScaling.of(config.fp8))


def switch_on_fp8(model: nn.Module, config: ExperimentConfig) -> Fp8Products | None:
    """Let the chunk's products run in FP8 from its next forward on; None where the run is without FP8."""
    return Fp8Products(model, config, choose_backend(config).name) if config.use_fp8 else None


_Switch = tuple[Callable[[DelayedScaling], ScalingState], Callable[[], None]]


def _switches(model: nn.Module) -> dict[str, _Switch]:
    """Global name of a product -> how to switch FP8 on and off, in the order of the model."""
    found: dict[str, _Switch] = {}
    for name, module in globally_named(model, model.named_modules()).items():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            found[name] = (module.enable_fp8, module.disable_fp8)
        elif isinstance(module, GroupedExperts):
            for product in EXPERT_PRODUCTS:
                found[f"{name}.{product}"] = _expert_switch(module, product)
    return found


def _expert_switch(experts: GroupedExperts, product: str) -> _Switch:
    return lambda recipe: experts.enable_fp8(product, recipe), lambda: experts.disable_fp8(product)


def initial_of_state(name: str) -> float | None:
    """The initial value of a history or scale by its global name, with which a run without FP8 goes on in it.

    None for every other buffer.
    """
    return initial_of(name.rpartition(".")[2]) if is_fp8_state(name) else None


def check_products(
    chunks: Sequence[Any], config: ExperimentConfig, all_names: Callable[[list[str]], list[str]]
) -> None:
    """Refuse words of ``fp8.keep_bf16`` that no product of any stage answers to, and shapes that cannot be multiplied.

    Args:
        chunks: This rank's.
        config: The run.
        all_names: Joins the names of all stages.
    Raises:
        ConfigError: on every rank for words; where the shapes are for shapes.
    Collective: pipeline-parallel group, where FP8 is on.
    """
    if not config.use_fp8:
        return
    names = all_names([name for chunk in chunks for name in chunk.fp8.names])
    strange = unmatched(names, config.fp8.keep_bf16, config.model.num_layers)
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    problems = [
        f"fp8.keep_bf16={word}: no product of the model has such a name; they are decoder.layers.N... and end "
        f"in {kinds}; patterns take * and ?"
        for word in strange
    ]
    rows = (config.batch_size or 1) * (config.block_size or 1) // config.parallel.context
    problems += [problem for chunk in chunks for problem in chunk.fp8.shape_problems(rows)]
    if problems:
        raise ConfigError(problems)
