"""A row of the table: everything that the pipeline knows about an optimizer, as frozen data."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_optim.errors import said
from lightning_optim.table import _availability as availability
from lightning_optim.table._availability import Availability, Requirement
from lightning_optim.table._options import Options

Warmup = Literal["schedule", "optimizer", "none"]

_CALLS = "its step calls the closure itself, which computes the gradients of all parameters"
_DIFFERENTIATES = "its step differentiates the gradients once more, which needs those of all parameters and their graph"

_UNKNOWN = "nobody has shown that it computes the same on parts of parameters"


@dataclass(frozen=True)
class Buffer:
    """A state tensor that the optimizer keeps per parameter, of its shape unless ``elements`` is given.

    Attributes:
        name: Key in the optimizer's state.
        float32: True if it is stored in float32 where the parameter's dtype is narrower; else it has that dtype. May be
            a function of the options.
        copies: How many tensors of the parameter's shape it holds.
        when: Whether it exists, as a function of the options; ``None`` means always.
        low_precision_only: True if it exists only for parameters of two bytes per element (bfloat16, float16).
        elements: Its number of elements, as a function of the parameter's shape and the options, 0 if it does not
            exist; ``None`` means as many as the parameter has.
        quantized: False if it stays unquantized where the row quantizes its states.
        element_size: Bytes per element, as a function of the options; ``None`` means as above.
    """

    name: str
    float32: bool | Callable[[Any], bool] = False
    copies: int = 1
    when: Callable[[Any], bool] | None = None
    low_precision_only: bool = False
    elements: Callable[[tuple[int, ...], Any], int] | None = None
    quantized: bool = True
    element_size: Callable[[Any], int] | None = None

    def is_float32(self, options: Options, bits: int | None = None) -> bool:
        """Whether it is float32 where the parameter's dtype is narrower.

        The group's ``optim_bits``, ``bits=32``, keep the state in float32 unless the options decide its dtype.
        """
        return self.float32(options) if callable(self.float32) else self.float32 or bits == 32

    def exists(self, options: Options, element_size: int) -> bool:
        """Whether it is kept for a parameter of ``element_size`` bytes per element."""
        if self.low_precision_only and element_size > 2:
            return False
        return self.when is None or self.when(options)


@dataclass(frozen=True)
class Quantization:
    """How a row stores its buffers block-wise in few bits.

    Attributes:
        bits: Bits per element.
        block_size: Elements per float32 scale; a number or the name of an option.
        min_size: Parameters with fewer elements stay unquantized; a number or the name of an option.
        whole_blocks: True if a parameter whose size is not a multiple of the block size stays unquantized.
        table_bytes: Bytes of the lookup table stored with each tensor (0 if it is shared).
        tables: Keys of lookup tables that all parameters share, which are not counted.
    """

    bits: int
    block_size: int | str
    min_size: int | str
    whole_blocks: bool = False
    table_bytes: int = 0
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateLayout:
    """What an optimizer stores, in enough detail to count its bytes without allocating them.

    Attributes:
        buffers: Tensors per parameter.
        scalar_bytes: Bytes per parameter tensor for counters: 0-dim tensors in float32.
        counters: Their keys, except ``step``. torch would load them in the parameter's dtype.
        scalars_like_parameter: Number of 0-dim tensors per parameter tensor in the parameter's dtype.
        quantization: How the buffers are quantized, if they are.
    """

    buffers: tuple[Buffer, ...]
    scalar_bytes: int = 0
    counters: tuple[str, ...] = ()
    scalars_like_parameter: int = 0
    quantization: Quantization | None = None

    @property
    def always(self) -> dict[str, int | None]:
        """What it always stores, by key: the number of tensors of the parameter's shape, or ``None`` for a counter."""
        counters = ("step", *self.counters) if self.scalar_bytes else ()
        return dict.fromkeys(counters) | {
            buffer.name: buffer.copies
            for buffer in self.buffers
            if buffer.when is None and buffer.elements is None and not buffer.low_precision_only
        }


@dataclass(frozen=True)
class MatrixFlag:
    """What the groups of a class say by a flag: whether it steps their parameters as hidden matrices.

    Attributes:
        key: The group's key: ``"use_muon"``.
        lr: The option that is the learning rate of all other parameters.
        weight_decay: The option that is their weight decay.
    """

    key: str
    lr: str
    weight_decay: str

    def rates(self, options: Options) -> tuple[float, float]:
        """Returns learning rate and weight decay of the other parameters."""
        return getattr(options, self.lr), getattr(options, self.weight_decay)


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of the table.

    Attributes:
        name: The identifier.
        target: The class to build, ``"package.module:Class"``; imported only when the identifier is built.
        summary: One line.
        source: Paper or library the algorithm comes from.
        options: The dataclass that declares the options.
        default_lr: Default learning rate; ``None`` if one must be given.
        default_weight_decay: Default weight decay.
        state: What it stores.
        wraps: The upstream class if ``target`` is an adapter of ours, else empty.
        requirements: Packages it needs beyond torch.
        extra: The extra of our distribution that installs them, or empty.
        fixed: Constructor arguments that make this row what it is, such as ``optim_bits=8``.
        aliases: Other names of the same row.
        devices: Device types it runs on; ``None`` means every device.
        warmup: What warms up the learning rate: a schedule, the optimizer (its constructor takes ``warmup_steps``), or
            nothing because the algorithm needs no warm-up.
        decays: False if the class takes no ``weight_decay``.
        averages_weights: True if the weights to evaluate and save are an average kept by the optimizer, which must then
            be switched between training and evaluation.
        sparse: True if it can step sparse gradients.
        complex: True if it can step complex parameters.
        sharded: True if it gives the right result on DTensor parameters (FSDP2, tensor parallelism).
        unsharded: Why it does not, or empty if it does; said for those that are not ``sharded``.
        half_weights: True if it can step float16 parameters without loss scaling, because it computes in float32 or
            has no epsilon that float16 rounds to zero.
        compiles: True if it calls torch.compile in its step, which on CPU needs a C++ compiler.
        layerwise: True if it is stepped during backward, bucket by bucket (``_layerwise`` at the end of its name).
        lists_layerwise: True if ``lightning-optim list`` shows its ``_layerwise`` form, which is also a Hugging Face
            name.
        takes: ``"hidden matrices"`` if it steps only these and leaves the other parameters to the identifier in its
            option ``others``; ``"matrices"`` if it also takes embeddings and the output layer.
        flag: What its groups say of hidden matrices, for a class that steps these and all others; ``None`` if nothing.
        only_matrices: True if it takes parameters of two dimensions only.
        one_group: True if it takes one param group only.
        needs_closure: True if its step calls the closure itself, once or more (LBFGS).
        needs_graph: True if its step differentiates the gradients once more, which takes
            ``backward(create_graph=True)``; under a Trainer that is taken care of.
        needs_process_group: True if it takes part in ``torch.distributed`` itself, which must be initialized.
        projects: True if it projects the gradients of chosen matrices (``optim_target_modules``) to a ``rank``.
        coupled: Why one parameter cannot be stepped without the others, or empty if it can; said for those that need
            the closure or the graph.
        xla: Why it cannot run on XLA devices, or empty if it can.
        choices: Identifiers of which this one takes the first that can run; none of them has choices itself.
        fallbacks: The closest identifiers; ``optim_fallback=True`` takes the first that can run.
        in_place: Device types on which it steps by kernels that write in place: its step takes no memory.
        paged_on: Device types on which its states are paged, for a row that promises it; ``None`` for others.
        state_format: Name and version of its state's format; checkpoints move only between rows of one format. Empty
            means the class's dotted path: only the same class reads it.
        kin: Identifiers of the same algorithm, for a row made for a dotted path.
        note: A limitation worth a line in ``info`` and the docs.
    """

    name: str
    target: str
    summary: str
    source: str
    options: type[Options]
    default_lr: float | None
    default_weight_decay: float
    state: StateLayout | None
    wraps: str = ""
    requirements: tuple[Requirement, ...] = ()
    extra: str = ""
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    aliases: tuple[str, ...] = ()
    devices: frozenset[str] | None = None
    warmup: Warmup = "schedule"
    decays: bool = True
    averages_weights: bool = False
    sparse: bool = False
    complex: bool = False
    sharded: bool = False
    unsharded: str = ""
    half_weights: bool = False
    compiles: bool = False
    layerwise: bool = False
    lists_layerwise: bool = False
    takes: Literal["all", "hidden matrices", "matrices"] = "all"
    flag: MatrixFlag | None = None
    only_matrices: bool = False
    one_group: bool = False
    needs_closure: bool = False
    needs_graph: bool = False
    needs_process_group: bool = False
    projects: bool = False
    coupled: str = ""
    xla: str = ""
    choices: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    in_place: frozenset[str] = frozenset()
    paged_on: frozenset[str] | None = None
    state_format: str = ""
    kin: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if not self.coupled and (self.needs_closure or self.needs_graph):
            object.__setattr__(self, "coupled", _CALLS if self.needs_closure else _DIFFERENTIATES)
        if self.sharded or not self.unsharded:
            # A row made from another by dataclasses.replace may have its reason still.
            object.__setattr__(self, "unsharded", "" if self.sharded else _UNKNOWN)

    @property
    def implementation(self) -> str:
        """The class whose algorithm runs, as a dotted path for humans."""
        return self.wraps or self.target.replace(":", ".")

    @property
    def format(self) -> str:
        """The format of its state."""
        return self.state_format or self.implementation

    @property
    def bits(self) -> int | None:
        """Bits of the quantized state, or ``None`` if the state is not quantized."""
        quantization = self.state.quantization if self.state else None
        return quantization.bits if quantization else None

    def runs_on(self, devices: Set[str]) -> bool:
        """Whether it can step parameters on all of these types of device."""
        return (self.devices is None or devices <= self.devices) and not (self.xla and "xla" in devices)

    def availability(self) -> Availability:
        """Returns whether the packages are usable, without importing them."""
        return availability.check(self.requirements)

    def load(self, nearest: Sequence[str] = ()) -> type[Optimizer]:
        """Imports and returns the class.

        Args:
            nearest: Identifiers to suggest instead if it cannot be imported.

        Raises:
            MissingDependency: If a package is absent, too old, known to be wrong, or cannot be imported.
        """
        availability.ensure(self.name, self.requirements, nearest)
        try:
            loaded: type[Optimizer] = pkgutil.resolve_name(self.target)
        except ImportError as error:
            if not self.requirements:
                raise
            # So far only its name was found: it may have been built without its kernels, or for another torch.
            commands = "; ".join(requirement.install_command for requirement in self.requirements)
            reason = f"its package is installed, but importing it fails ({said(error)}): {commands}"
            raise availability.missing(self.name, (reason,), nearest) from error
        return loaded
