"""What an architecture is: one object that the rest of the program reads. Imports no torch.

`model.architecture` names a module: a file of `pretrain.model.architectures`, or any module that Python can import. The
module defines `SPEC`: the class that builds the layers, a table of its modules, and what a block keeps for its backward
pass. The table says how tensor parallelism splits each module, and how each parameter is initialised, updated and
counted. It has no shapes: these are read from the model, built on the meta device. docs/extend/architecture.md writes a
new architecture step by step.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.model.activation_terms import ActivationSizes, BlockActivations


@dataclass(frozen=True)
class InitialValues:
    """Initial values of a parameter: normal, or constant."""

    std: Callable[[ModelConfig], float] | None = None
    """Standard deviation of normal values."""
    constant: float = 0.0
    """The value of all elements, if `std` is None."""


NORMAL = InitialValues(lambda config: config.init_std)
RESIDUAL = InitialValues(lambda config: config.init_std / math.sqrt(2 * config.n_layers))
"""For matrices that write into the residual stream, as in GPT-2."""
ONES, ZEROS = InitialValues(constant=1.0), InitialValues(constant=0.0)


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that the optimizer treats alike."""

    name: str
    decays: bool
    """Whether weight decay applies."""
    muon: bool = False
    """Whether `optim.kind=muon` updates them by Muon; AdamW updates the others."""
    matrices_per_expert: int = 0
    """For stacked experts [E, rows, columns]: number of matrices below one another in the rows of an expert, which Muon
    orthogonalises one by one. 0 means that a parameter is one matrix."""


MATRICES = OptimizerGroup("matrices", decays=True, muon=True)
EXPERT_GATE_UP = OptimizerGroup("expert gate and up", decays=True, muon=True, matrices_per_expert=2)
"""Of `gate_up_proj` [E, 2F, D]: the gate's F rows, then the up projection's."""
EXPERT_DOWN = OptimizerGroup("expert down", decays=True, muon=True, matrices_per_expert=1)
HEAD = OptimizerGroup("head", decays=True)
EMBEDDINGS = OptimizerGroup("embeddings", decays=False)
VECTORS = OptimizerGroup("vectors", decays=False)


@dataclass(frozen=True)
class ParameterSpec:
    """What the program knows of a parameter beside its name and shape."""

    kind: str
    """What reports count it as: `embedding`, `attention`, `mlp`, `norms`, `biases`, `head`, or a word of your own."""
    initial: InitialValues
    group: OptimizerGroup
    products: float | Callable[[ModelConfig], float] = 0.0
    """Fraction of the tokens that it multiplies: 1 for a linear layer, 0 for a lookup or a norm, top_k / n_experts
    for experts."""

    def products_of(self, config: ModelConfig) -> float:
        """`products` in a model of that config."""
        return self.products if isinstance(self.products, (int, float)) else self.products(config)


@dataclass(frozen=True)
class ModuleSpec:
    """A row of an architecture's table: a module, by a pattern of its name."""

    style: str
    """How tensor parallelism splits it: a word of `parallel.tensor_styles`."""
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    """{name within the module: spec} of its own parameters. A row may name parameters that a config leaves out."""


def linear(
    style: str, kind: str, initial: InitialValues = NORMAL, group: OptimizerGroup = MATRICES, products: float = 1.0
) -> ModuleSpec:
    """The row of a linear layer, with or without a bias."""
    return ModuleSpec(
        style,
        {
            "weight": ParameterSpec(kind, initial, group, products),
            "bias": ParameterSpec("biases", ZEROS, VECTORS),
        },
    )


def norm(style: str) -> ModuleSpec:
    """The row of a norm."""
    return ModuleSpec(style, {"weight": ParameterSpec("norms", ONES, VECTORS)})


def embedding(style: str) -> ModuleSpec:
    """The row of the token embedding.

    If it is tied, `pretrain.estimate.flops` counts the product of the output projection.
    """
    return ModuleSpec(style, {"weight": ParameterSpec("embedding", NORMAL, EMBEDDINGS)})


class ModelClass(Protocol):
    """What the spec needs of `pretrain.model.transformer.Transformer`, which this module does not import."""

    @classmethod
    def parameter_shapes(cls, config: ModelConfig, layers: range) -> dict[str, tuple[int, ...]]:
        """{canonical name: shape} of the parameters of these layers, with those of the ends of the model that go
        with them."""


def causal_attention_flops(config: ModelConfig, seq_len: int, causal: bool) -> float:
    """FLOPs of one token in the two products of attention, forward and backward, in sequences of `seq_len` tokens.

    12 * n_layers * (n_heads * head_dim) * keys. On average a token sees seq_len / 2 keys, fewer under a sliding window,
    and all `seq_len` without `causal`.
    """
    window = min(config.sliding_window or seq_len, seq_len)
    seen = window - window * window / (2 * seq_len)
    return 12 * config.n_layers * config.n_heads * config.head_dim * (seen if causal else seq_len)


def _same_styles(config: ModelConfig, layer: int) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class ArchitectureSpec:
    """One architecture. Layers may differ: `Transformer.build_block` and `block_activations` get the layer's number."""

    model: type[ModelClass]
    """A subclass of `Transformer`, called with (config, attention, layers)."""
    modules: Mapping[str, ModuleSpec]
    """{pattern of module names: row}. `*` stands for a number, as that of a layer. Every parameter needs a row."""
    block_activations: Callable[[ModelConfig, ActivationSizes, int], BlockActivations]
    """(config, sizes, layer) -> what the layer's block keeps of one token for its backward pass."""
    attention_flops: Callable[[ModelConfig, int, bool], float] = causal_attention_flops
    """(config, seq_len, causal) -> FLOPs of one token in operations without weights, in all layers, both passes."""
    layer_styles: Callable[[ModelConfig, int], Mapping[str, str]] = _same_styles
    """(config, layer) -> {name of a module within the layer: style}, where they differ from the table."""

    def __post_init__(self) -> None:
        """Raises UserError for a table that contradicts itself."""
        for pattern, row in self.modules.items():
            if row.style in ("colwise", "kv_colwise") and any(p.initial is RESIDUAL for p in row.parameters.values()):
                raise UserError(
                    f"{self.source}: SPEC.modules has {pattern!r} write into the residual stream (RESIDUAL), but "
                    f"splits it {row.style!r}: each tensor rank would have some columns of the result; use 'rowwise', "
                    f"which adds up the results of the ranks"
                )

    @property
    def tp_plan(self) -> dict[str, str]:
        """{pattern of module names: style} of the table."""
        return {pattern: row.style for pattern, row in self.modules.items()}

    def find(self, name: str) -> tuple[str, ParameterSpec]:
        """Return (tensor-parallel style, spec) of the parameter with that canonical name.

        Raises:
            UserError: the table has no row for it.
        """
        pattern, _, own_name = ".".join("*" if part.isdigit() else part for part in name.split(".")).rpartition(".")
        row = self.modules.get(pattern)
        if row is None or own_name not in row.parameters:
            raise UserError(
                f"{self.source}: SPEC.modules has no row for the parameter {name}: "
                f"add {own_name!r} to the row {pattern!r}, which says how it is split, initialised and updated"
            )
        return row.style, row.parameters[own_name]

    @property
    def source(self) -> str:
        """Name of the module that defines the model."""
        return self.model.__module__


ARCHITECTURES = "pretrain.model.architectures"
"""Package of the architectures that come with the program. Imported by name, because its modules import this one."""

LAYERS = "model.layers."
"""Prefix of the names of all parameters of blocks, followed by the layer's number. Pipelines cut between layers. A
layer is what is recomputed, compiled and gathered as one."""


def layer_of(name: str) -> int | None:
    """Return the number of a parameter's layer; None for the ends of the model."""
    return int(name.removeprefix(LAYERS).partition(".")[0]) if name.startswith(LAYERS) else None


def architecture_of(config: ModelConfig) -> ArchitectureSpec:
    """Return the spec of `model.architecture`.

    Raises:
        UserError: there is no such module, or it defines no SPEC.
    """
    return _load(config.architecture)


def tp_plan(config: ModelConfig, layers: range) -> dict[str, str]:
    """Return the plan of these layers for `parallel.tensor`: {pattern of module names: style}.

    It is the architecture's table, or if layers differ, a row for each module of each layer.
    """
    architecture = architecture_of(config)
    if architecture.layer_styles is _same_styles:
        return architecture.tp_plan
    ends = {pattern: style for pattern, style in architecture.tp_plan.items() if not pattern.startswith(LAYERS)}
    rows = {layer: layer_plan(config, layer) for layer in layers}
    return ends | {f"{LAYERS}{layer}.{name}": style for layer, plan in rows.items() for name, style in plan.items()}


@lru_cache(maxsize=4096)
def layer_plan(config: ModelConfig, layer: int) -> dict[str, str]:
    """Return {name within the layer: style} of the modules of a layer that have rows."""
    architecture, prefix = architecture_of(config), f"{LAYERS}{layer}."
    names = architecture.model.parameter_shapes(config, range(layer, layer + 1))
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    # A module is there if a parameter lies in it or below it.
    present = {name.rsplit(".", depth)[0] for name in own for depth in range(1, name.count(".") + 1)}
    pattern = f"{LAYERS}*."
    table = {name.removeprefix(pattern): style for name, style in architecture.tp_plan.items()}
    styles = table | dict(architecture.layer_styles(config, layer))
    return {name: style for name, style in styles.items() if name in present}


def architecture_names() -> list[str]:
    """Names of the architectures that come with the program."""
    return sorted(module.name for module in pkgutil.iter_modules(import_module(ARCHITECTURES).__path__))


@cache
def _load(name: str) -> ArchitectureSpec:
    module_name = f"{ARCHITECTURES}.{name}" if name in architecture_names() else name
    if not _exists(module_name):
        raise UserError(
            f"model.architecture={name}: no architecture of that name (there is {', '.join(architecture_names())}), "
            "and no module of that name to import; a file of your own has to be on PYTHONPATH"
        )
    spec = getattr(import_module(module_name), "SPEC", None)
    if not isinstance(spec, ArchitectureSpec):
        raise UserError(f"model.architecture={name}: the module {module_name} defines no SPEC = ArchitectureSpec(...)")
    return spec


def _exists(module_name: str) -> bool:
    try:
        return find_spec(module_name) is not None
    except (ImportError, ValueError):  # a package that does not exist, or a name such as `a..b`
        return False
