"""What a model family is: a record that the registry holds; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig

_DOTTED = re.compile(r"\w+(\.\w+)*:\w+")


@dataclass(frozen=True)
class Preset:
    """A published or house shape of a family."""

    model: ModelConfig
    """The whole shape."""
    source: str
    """URL, or paper and table, that the shape was taken from."""
    num_parameters: int
    """Parameter count stated by the source (or counted once, for a house shape); tests compare within 1%."""
    lr: float
    """Peak learning rate that the source used for this size."""
    batch_size: int = 8
    """Default samples per microbatch."""
    num_active_parameters: int | None = None
    """Parameters that a token is multiplied with, where the source states them (models with experts)."""


@dataclass(frozen=True)
class Family:
    """One line of the registry."""

    name: str
    summary: str
    config_class: type[ModelConfig]
    presets: Mapping[str, Preset]
    model_builder: str
    """Dotted path ``package.module:function`` of the function that builds the model."""
    objective: str
    """Dotted path of the function that builds the objective from the resolved configuration."""
    is_causal: bool = True
    """Whether a token attends to earlier ones only (halves the cost of attention)."""
    chosen_by: str = ""
    """The flags that choose this variant of a family, as a person would write them."""
    variants: tuple[Family, ...] = ()
    """The same family with other classes of shapes, which fields of the model choose (``ModelConfig.CHOICES``)."""

    def variant(self, stated: Mapping[str, str]) -> Family:
        """The variant that the stated ``CHOICES`` of the model choose; this one where none does."""
        everything = (self, *self.variants)
        return next((one for one in everything if one.config_class.is_chosen_by(stated)), self)

    def holds(self, model: ModelConfig) -> bool:
        """Whether a shape is of this family, in any variant."""
        return any(isinstance(model, one.config_class) for one in (self, *self.variants))

    def problems(self) -> list[str]:
        """What contradicts itself in this entry, one line each; imports nothing."""
        found = [
            f"{self.name}: {dotted!r} is no path package.module:function"
            for dotted in (self.model_builder, self.objective)
            if not _DOTTED.fullmatch(dotted)
        ]
        for one in (self, *self.variants):
            for size, preset in one.presets.items():
                if type(preset.model) is not one.config_class:
                    kind, wanted = type(preset.model).__name__, one.config_class.__name__
                    found.append(f"{self.name}: preset {size!r} is a {kind}, not a {wanted}")
                found += [f"{self.name}: preset {size!r}: {problem}" for problem in preset.model.problems()]
            if ExperimentConfig.size not in one.presets:
                found.append(f"{self.name}: {one.config_class.__name__} has no preset {ExperimentConfig.size!r}")
        return found

    def load_model_builder(self) -> Any:
        """Import and return the builder (torch and megatron-core load here)."""
        return _load(self.model_builder)

    def load_objective_builder(self) -> Any:
        """Import and return the function that builds the objective from an ``ExperimentConfig``."""
        return _load(self.objective)


def _load(dotted: str) -> Any:
    from importlib import import_module

    module, _, name = dotted.partition(":")
    return getattr(import_module(module), name)
