"""The ``_layerwise`` form of a row, derived from the plain one."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, make_dataclass
from typing import Literal

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.table._options import NON_NEGATIVE, Options, option
from lightning_optim.table._spec import OptimizerSpec

SUFFIX = "_layerwise"


@dataclass(frozen=True)
class LayerwiseOptions(Options):
    """How gradients are collected, stepped and clipped during backward; ``None`` means not given."""

    bucket_mb: float | None = option(
        None,
        "MiB of gradients alive at once in addition to the arriving one, 0 for one parameter at a time; "
        "None takes an eighth of all, at least 0.25 (or half of all) and at most 32",
        NON_NEGATIVE,
        scope="layerwise",
    )
    norm_clipping: Literal["exact", "previous", "per_parameter"] | None = option(
        None,
        "with gradient_clip_val: 'exact' measures in a separate backward, 'previous' takes the previous step's norm, "
        "'per_parameter' clips each gradient separately; None is 'exact'",
        scope="layerwise",
    )
    log_grad_norm: bool | None = option(None, "log the norm before clipping as 'grad_norm'", scope="layerwise")
    overflow: Literal["skip_bucket", "skip_step"] | None = option(
        None,
        "with loss scaling (16-mixed): 'skip_step' measures in a separate backward and skips the whole step, "
        "'skip_bucket' steps the other buckets; None is 'skip_bucket', with a warning",
        scope="layerwise",
    )
    gradient_readers: Literal["warn", "ignore"] | None = option(
        None,
        "what to do about hooks that read gradients after they were stepped and freed, watched in the first two "
        "steps; None is 'warn'",
        scope="layerwise",
    )
    norm_budget_mb: float | None = option(
        None,
        "MiB of gradients that may stay alive so that exact clipping by norm and overflow='skip_step' need no backward "
        "of their own; None is 0",
        NON_NEGATIVE,
        scope="layerwise",
    )


def layerwise_row(row: OptimizerSpec) -> OptimizerSpec:
    """Returns the row that steps ``row``'s optimizer during backward, under its name with the suffix.

    Raises:
        IncompatibleTrainer: If the optimizer cannot step one parameter without the others.
    """
    if row.coupled:
        raise IncompatibleTrainer(f"optim={row.name + SUFFIX!r}: {row.coupled}. Use optim={row.name!r}.", code="LO610")
    stepped = row if row.layerwise else stepped_in_backward(row)
    names = {
        field: tuple(name + SUFFIX for name in getattr(row, field)) for field in ("aliases", "choices", "fallbacks")
    }
    return dataclasses.replace(stepped, name=row.name + SUFFIX, **names)  # type: ignore[arg-type]


def stepped_in_backward(row: OptimizerSpec) -> OptimizerSpec:
    """Returns ``row`` stepped during backward under the same name, for algorithms designed for it (LOMO)."""
    return dataclasses.replace(
        row,
        summary=f"{row.summary}, stepped during backward",
        options=_with_layerwise_options(row.options),  # type: ignore[arg-type]
        layerwise=True,
    )


@functools.cache
def _with_layerwise_options(options: type[Options]) -> type[Options]:
    """Returns ``options`` followed by the fields of :class:`LayerwiseOptions`; the same type every time."""
    name = options.__name__.removesuffix("Options") + "LayerwiseOptions"
    namespace = {"__doc__": options.__doc__}
    return make_dataclass(name, (), bases=(LayerwiseOptions, options), namespace=namespace, frozen=True)
