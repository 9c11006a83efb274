"""Which of our optimizers the processes step on shards, and how parameters are spread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_optim import REGISTRY
from tests.cases import BY_NAME, Case

Shape = tuple[int, ...]

# Rows that two processes do not divide, fewer rows than processes, vectors, a convolution; even ones, large enough to
# be stacked where they are whole.
MATRICES: tuple[Shape, ...] = ((7, 5), (1, 6), (64, 64), (48, 32), (16, 80), (4, 3, 2, 2), (2, 9), (40, 24))
SHAPES = (*MATRICES, (3,), (5,))
STEPS = 10


@dataclass(frozen=True)
class Stepped:
    """An optimizer to step on shards.

    Attributes:
        name: Of its class in ``lightning_optim.optimizers``.
        options: Its arguments.
        shapes: Of the parameters.
        apart: The greatest difference between weights after :data:`STEPS` steps; 0 where no sum crosses processes.
        rounds: How often a step sends, away from refreshes of subspaces: once for all parameters.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = SHAPES
    apart: float = 1e-6
    rounds: int = 0

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items() if name != "lr")])


LOW_RANK: dict[str, Any] = {"lr": 1e-2, "rank": 4, "update_proj_gap": 4}
EXPERTS: tuple[Shape, ...] = ((5, 8, 6), (3, 4, 9))
CASES = (
    Stepped("Adafactor", {"lr": 1e-2, "scale_parameter": True, "weight_decay": 0.1}, rounds=3),
    Stepped("Adafactor", {"lr": 1e-2, "beta1": 0.9}, rounds=2),
    Stepped("AdaLomo", {"lr": 1e-2}, rounds=3),
    Stepped("CAME", {"lr": 1e-3, "weight_decay": 0.1}, rounds=3),
    Stepped("Lamb", {"lr": 1e-2}, rounds=1),
    Stepped("Lars", {"lr": 0.1, "weight_decay": 0.1}, rounds=1),
    Stepped("Scale", {"lr": 1e-2}, MATRICES, apart=0.0),
    Stepped("Scale", {"lr": 1e-2, "momentum": 0.9, "outputs": "columns"}, MATRICES, rounds=1),
    Stepped("GaLoreAdamW", {**LOW_RANK, "weight_decay": 0.1}, rounds=2),
    Stepped("GaLoreAdamW", {**LOW_RANK, "proj_type": "reverse_std"}, rounds=2),
    Stepped("GaLoreAdafactor", {**LOW_RANK, "beta1": 0.9, "scale_parameter": True}, rounds=4),
    Stepped("ApolloAdamW", LOW_RANK, rounds=3),
    Stepped("ApolloAdamW", {**LOW_RANK, "proj_type": "reverse_std"}, rounds=3),
    Stepped("ApolloAdamW", {"lr": 1e-2, "rank": 1, "scale": 128.0, "scale_type": "tensor"}, rounds=3),
    Stepped("Muon", {"lr": 1e-2}, MATRICES, apart=0.0, rounds=2),
    Stepped("Muon", {"lr": 1e-2, "cautious": True, "nesterov": False}, MATRICES, apart=0.0, rounds=2),
    Stepped("Muon", {"lr": 1e-2, "stack_dims": 1}, EXPERTS, apart=0.0, rounds=2),
    Stepped("NorMuon", {"lr": 1e-2}, MATRICES, rounds=3),
    Stepped("NorMuon", {"lr": 1e-2, "split": 4}, ((64, 64), (48, 32), (16, 80), (12, 8)), rounds=3),
    Stepped("NorMuon", {"lr": 1e-2, "stack_dims": 1, "split": 2}, EXPERTS, rounds=3),
    # The end of a tensor, past the last full vector, is rounded by other instructions.
    Stepped("GrokAdamW", {"lr": 1e-2}, apart=1e-7),
    Stepped("Adopt", {"lr": 1e-2}, apart=0.0),
    Stepped("Adan", {"lr": 1e-2}, apart=0.0),
    Stepped("AnyPrecisionAdamW", {"lr": 1e-2}, apart=0.0),
    Stepped("LOMO", {"lr": 1e-2}, apart=0.0),
)

#: By name: the dimensions of the mesh for four processes, and the dimension of a parameter that each splits.
MESHES: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "rows": ((-1,), (0,)),
    # Copies of shards: hybrid sharding.
    "hybrid": ((2, 2), (None, 0)),
    # FSDP2 over tensor parallelism by rows of the input.
    "grid": ((2, 2), (0, 1)),
}


def meshes(processes: int) -> list[str]:
    """Returns which meshes so many processes make."""
    return list(MESHES) if processes == 4 else ["rows"]


def fits(case: Stepped, mesh: str) -> bool:
    """Whether a case can be spread so: a grid splits two dimensions, and no optimizer takes split flattened ones."""
    return bool(shapes_on(case, mesh))


def shapes_on(case: Stepped, mesh: str) -> list[Shape]:
    """Returns the shapes of a case's parameters on a mesh."""
    return [shape for shape in case.shapes if mesh != "grid" or len(shape) == 2]


@dataclass(frozen=True)
class Way:
    """A strategy under which every name is trained, or refused.

    Attributes:
        name: The column of the table of strategies, or what is like one.
        flag: For ``Trainer(strategy=...)``.
        processes: How many.
        layerwise: Whether it steps during backward.
        tensor_parallel: Processes in each tensor-parallel group where parameters are sharded; ``None`` where not.
    """

    name: str
    flag: str = ""
    processes: int = 2
    layerwise: bool = False
    tensor_parallel: int | None = None


ALONE = Way("single_device", "auto", 1)
#: The columns of the table, and what steps during backward under tensor parallelism.
WAYS = {
    way.name: way
    for way in (
        ALONE,
        Way("ddp", "ddp"),
        Way("layerwise_ddp", "layerwise_ddp", layerwise=True),
        Way("fsdp2", tensor_parallel=1),
        Way("layerwise_fsdp2", layerwise=True, tensor_parallel=1),
        Way("tensor_parallel", tensor_parallel=2),
        Way("layerwise_tensor_parallel", layerwise=True, tensor_parallel=2),
    )
}
#: Both at once, for a small transformer.
GRID = tuple(Way(f"{kind}grid", "", 4, bool(kind), tensor_parallel=2) for kind in ("", "layerwise_"))
GRID_NAMES = ("adamw_torch", "adamw", "adafactor", "muon", "galore_adamw", "apollo_adamw", "schedule_free_adamw")


def strategy_case(name: str) -> Case:
    """Returns the case of a name, also of one that no CPU stands in for."""
    return BY_NAME.get(name) or Case(name, REGISTRY[name].target)
