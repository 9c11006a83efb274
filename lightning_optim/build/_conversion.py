"""What a conversion of foreign arguments gives: the counterparts, and a remark on each that is not simply written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_optim.build._plain import storable
from lightning_optim.build._training_arguments import Place

#: ``differs``: written, but not quite the same; ``unused``: without an effect there, so not written; ``yours``: what to
#: write elsewhere; ``none``: no counterpart; ``unknown``: no argument of the Trainer.
Kind = Literal["differs", "unused", "yours", "none", "unknown"]


@dataclass(frozen=True)
class Remark:
    """What became of arguments that are not simply written.

    Attributes:
        kind: ``"differs"``, ``"unused"``, ``"yours"``, ``"none"`` or ``"unknown"``.
        values: The arguments, as the source calls them, and their values.
        text: What to know or to write.
        place: Where the counterpart stands, one of ``PLACES``; empty for what is no argument.
    """

    kind: Kind
    values: Mapping[str, Any]
    text: str
    place: Place | Literal[""] = ""

    @property
    def given(self) -> str:
        """The arguments with their values, in short."""
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.values.items())


@dataclass(frozen=True)
class Conversion:
    """The counterparts of ``TrainingArguments``.

    Attributes:
        dialect: Whose keys the source has: ``"transformers"``, ``"axolotl"`` or ``"LLaMA-Factory"``.
        optim: Arguments of :class:`~lightning_optim.OptimConfig`, :class:`~lightning_optim.OptimMixin` and
            :class:`~lightning_optim.OptimCallback`.
        trainer: Arguments of ``Trainer``.
        checkpoint: Arguments of a ``ModelCheckpoint`` to give the Trainer; empty for Lightning's own.
        seed: For ``seed_everything``.
        written: The arguments that are written, as the source calls them.
        remarks: What is not simply written.
        silent: Arguments whose value asks for nothing.
    """

    dialect: str
    optim: dict[str, Any]
    trainer: dict[str, Any]
    checkpoint: dict[str, Any]
    seed: int
    written: tuple[str, ...]
    remarks: tuple[Remark, ...]
    silent: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """What a configuration file of :class:`~lightning_optim.OptimCLI` holds."""
        callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": self.checkpoint}]
        trainer = self.trainer | ({"callbacks": callbacks} if self.checkpoint else {})
        return dict(storable({"seed_everything": self.seed, **self.optim, "trainer": trainer}))

    def as_yaml(self) -> str:
        """Returns :attr:`config` as a file for ``--config``."""
        import yaml  # type: ignore[import-untyped]  # Lightning needs it, too.

        return str(yaml.safe_dump(self.config, sort_keys=False))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:56]} ..."
