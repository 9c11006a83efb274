"""What is combined: each axis with its values, the first of which is the ordinary one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.cases import BY_NAME, NAMES, Case

#: By axis, its values. ``modules.py`` and ``fits.py`` say what each of them does.
AXES: Mapping[str, tuple[str, ...]] = {
    # SGD steps whatever there is: sparse, complex, float16 and sharded parameters, and by a fused kernel.
    "identifier": ("sgd", *(name for name in NAMES if name != "sgd")),
    "form": ("plain", "layerwise"),
    "precision": ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"),
    # Five batches in an epoch: the last step of three has two.
    "accumulation": ("1", "2", "3"),
    "clipping": ("none", "norm", "value", "tiny norm", "tiny value", "huge norm"),
    "schedule": ("none", "linear", "cosine, warm-up", "plateau"),
    "strategy": ("auto", "layerwise", "fused", "ddp", "fused_ddp", "layerwise_ddp", "layerwise_fsdp2"),
    "callback": (
        "none",
        "EMA",
        "SWA",
        "BackboneFinetuning",
        "LearningRateFinder",
        "BatchSizeFinder",
        "GradientAccumulationScheduler",
        "EarlyStopping",
        "ModelCheckpoint",
    ),
    "flag": (
        "none",
        "detect_anomaly",
        "overfit_batches",
        "fast_dev_run",
        "barebones",
        "max_time",
        "val_check_interval",
        "reload_dataloaders",
    ),
    "compile": ("no", "blocks", "whole"),
    "checkpointing": ("no", "non-reentrant", "reentrant"),
    "module": (
        "ordinary",
        "tied",
        "0-dim",
        "frozen",
        "unused",
        "channels_last",
        "complex",
        "sparse",
        "two dtypes",
        "unicode",
        "BatchNorm",
        "experts",
    ),
}
DEFAULTS: Mapping[str, str] = {axis: values[0] for axis, values in AXES.items()}
#: The strategies of several processes.
DISTRIBUTED = frozenset({"ddp", "fused_ddp", "layerwise_ddp", "layerwise_fsdp2"})
#: An axis with one of its values.
Setting = tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """One value of each axis, in the order of :data:`AXES`."""

    values: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Cell:
        """Returns the cell with these values, and ordinary ones otherwise.

        Raises:
            ValueError: If an axis has no such value.
        """
        for axis, value in settings.items():
            if value not in AXES.get(axis, ()):
                raise ValueError(f"{axis}={value!r} is none of {AXES.get(axis, tuple(AXES))}")
        return cls(tuple(settings.get(axis, default) for axis, default in DEFAULTS.items()))

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Returns the cell that :attr:`name` names."""
        return cls.of(dict(part.strip().split("=", 1) for part in text.split(";") if part.strip()))

    def __getitem__(self, axis: str) -> str:
        return self.values[_PLACES[axis]]

    @property
    def settings(self) -> Iterator[Setting]:
        """Its values by axis."""
        return zip(AXES, self.values, strict=True)

    @property
    def name(self) -> str:
        """The values that are not ordinary, as ``python -m tests.stress`` takes them."""
        odd = [f"{axis}={value}" for axis, value in self.settings if value != DEFAULTS[axis]]
        return "; ".join(odd) or f"form={DEFAULTS['form']}"

    @property
    def case(self) -> Case:
        """The identifier's case."""
        return BY_NAME[self["identifier"]]

    @property
    def distributed(self) -> bool:
        """Whether it takes two processes."""
        return self["strategy"] in DISTRIBUTED

    @property
    def in_backward(self) -> bool:
        """Whether it steps during backward."""
        return self["form"] == "layerwise" or self.case.in_backward or self["strategy"].startswith("layerwise")

    @property
    def pairs(self) -> Iterator[tuple[Setting, Setting]]:
        """Every two of its values."""
        settings = list(self.settings)
        return ((settings[i], settings[j]) for i in range(len(settings)) for j in range(i + 1, len(settings)))


_PLACES = {axis: place for place, axis in enumerate(AXES)}


def all_pairs() -> list[tuple[Setting, Setting]]:
    """Returns every two values of any two axes."""
    axes = list(AXES.items())
    return [
        ((first, one), (second, other))
        for place, (first, ones) in enumerate(axes)
        for second, others in axes[place + 1 :]
        for one in ones
        for other in others
    ]


def alone(*pair: Setting) -> tuple[Cell, ...]:
    """Returns the cells with these values in which all else is ordinary, with the best identifier first."""
    settings = dict(pair)
    if "identifier" in settings:
        return (Cell.of(settings),)
    return tuple(Cell.of({**settings, "identifier": name}) for name in ("sgd", "adamw"))
