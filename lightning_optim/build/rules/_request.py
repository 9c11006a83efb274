"""Rules that need only the request; they are checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_optim.build._arguments import Arguments
from lightning_optim.build._curves import follows_the_step, get_schedule
from lightning_optim.build._resume import as_overrides, overridable
from lightning_optim.errors import listing
from lightning_optim.table import REGISTRY, OptimizerSpec, Options, describe


@dataclass(frozen=True)
class Request:
    """An identifier's row, the user's arguments, and the options among them with defaults filled in.

    ``parts`` are the requests of patterns, ``rest`` is what an optimizer for hidden matrices leaves to another.
    """

    spec: OptimizerSpec
    config: Arguments
    options: Options
    parts: Mapping[str, Arguments] = field(default_factory=dict)
    rest: Arguments | None = None

    @property
    def others(self) -> list[OptimizerSpec]:
        """The rows of the optimizers that patterns name."""
        return [REGISTRY.find(part.optim) for part in self.parts.values()]

    @property
    def name(self) -> str:
        """The identifier as the user typed it, which may be an alias."""
        return self.config.optim


def _no_schedule_for_averages(request: Request) -> str | None:
    name = request.config.lr_scheduler
    if not request.spec.averages_weights or name in (None, "constant"):
        return None
    return (
        f"lr_scheduler={name!r} together with optim={request.name!r}, which averages its iterates instead of following "
        "a schedule. Leave lr_scheduler out"
        + ("; warmup_steps is handed to the optimizer itself." if request.spec.warmup == "optimizer" else ".")
    )


def _warmup_has_an_effect(request: Request) -> str | None:
    config, spec = request.config, request.spec
    if not config.warmup_steps:
        return None
    if spec.warmup == "none":
        return (
            f"warmup_steps={config.warmup_steps} together with optim={request.name!r}, which needs no warm-up. Leave "
            "it out."
        )
    if spec.warmup == "schedule" and config.lr_scheduler is None:
        return (
            f"warmup_steps={config.warmup_steps} without lr_scheduler would be ignored. Add "
            "lr_scheduler='constant_with_warmup', 'linear' or 'cosine'."
        )
    return None


def _overrides_are_known(request: Request) -> str | None:
    known = dict.fromkeys(name for spec in (request.spec, *request.others) for name in overridable(spec))
    unknown = [name for name in as_overrides(request.config.override_on_resume) if name not in known]
    if not unknown:
        return None
    options = {info.name: info.scope for info in describe(request.spec.options)}
    reason = {
        None: "which a checkpoint does not hold",
        "group": "another value of which would not fit the saved state",
    }.get(options.get(unknown[0]), "which never comes from a checkpoint")
    return (
        f"override_on_resume names {unknown[0]!r}, {reason}. Of optim={request.name!r} these can win over a "
        f"checkpoint: {listing(known)}."
    )


def _plateau_and_constant_do_not_warm_up(request: Request) -> str | None:
    config = request.config
    if request.spec.warmup != "schedule" or not config.warmup_steps or config.lr_scheduler is None:
        return None
    if get_schedule(config.lr_scheduler).warms_up:
        return None
    return (
        f"warmup_steps={config.warmup_steps} together with lr_scheduler={config.lr_scheduler!r}, which has no warm-up. "
        "Use lr_scheduler='constant_with_warmup'."
    )


def _schedule_args_need_a_schedule(request: Request) -> str | None:
    if request.config.lr_scheduler_args and request.config.lr_scheduler is None:
        return "lr_scheduler_args without lr_scheduler would be ignored. Add lr_scheduler, for instance 'cosine'."
    return None


def _layer_pattern_needs_layer_decay(request: Request) -> str | None:
    if request.config.layer_pattern is not None and request.config.layer_decay is None:
        return "layer_pattern without layer_decay would be ignored. Add layer_decay, for instance 0.75."
    return None


def _demanding_ones_have_no_other_parts(request: Request) -> str | None:
    rest = [REGISTRY.find(request.rest.optim)] if request.rest is not None else []
    rows = [request.spec, *request.others, *rest]
    found = next((row for row in rows if row.needs_closure or row.needs_graph), None)
    if found is None or len(rows) == 1:
        return None
    why = (
        "calls the closure itself, which would leave the others without a gradient of their own"
        if found.needs_closure
        else "differentiates gradients whose graph the others' steps would have written over"
    )
    return (
        f"optim={found.name!r} together with other optimizers: its step {why}. Use it alone, or in manual optimization "
        "beside them."
    )


def _lr_is_known(request: Request) -> str | None:
    if request.config.lr is not None or request.options.default_lr(request.spec.default_lr) is not None:
        return None
    return f"optim={request.name!r} has no default learning rate. Give lr, for instance lr=1e-3{_or_kin(request)}."


def _or_kin(request: Request) -> str:
    """Returns what to use instead of a class by dotted path that computes its learning rate itself."""
    if not (request.spec.kin and getattr(request.options, "relative_step", False)):
        return ""
    without = " and optim_args={'relative_step': False}" if request.config.lr is None else ""
    scaled = {"scale_parameter": True} if getattr(request.options, "scale_parameter", False) else {}
    options = {"relative_step": True, **scaled}
    return f"{without}, or use optim={request.spec.kin[0]!r} with optim_args={options} and without lr"


def _weight_decay_exists(request: Request) -> str | None:
    if request.config.weight_decay and not request.spec.decays:
        return (
            f"weight_decay={request.config.weight_decay} together with optim={request.name!r}, which has none. Leave "
            "it out."
        )
    return None


def _averages_need_a_learning_rate(request: Request) -> str | None:
    if request.spec.averages_weights and request.config.lr == 0:
        return f"lr=0 together with optim={request.name!r}: the average is weighted by the learning rate. Use lr > 0."
    return None


def _target_modules_are_projected(request: Request) -> str | None:
    modules = request.config.optim_target_modules
    if modules is None or request.spec.projects or request.spec.takes == "hidden matrices" or request.spec.flag:
        return None
    return (
        f"optim_target_modules={modules!r} together with optim={request.name!r}, which projects nothing, would be "
        "ignored. Leave it out, or use optim='galore_adamw' or 'apollo_adamw'."
    )


def _relative_step_makes_the_learning_rate(request: Request) -> str | None:
    given = {"lr": request.config.lr}
    for pattern, values in (request.config.param_groups or {}).items():
        if pattern in request.parts:
            continue
        given[f"param_groups[{pattern!r}]['lr']"] = values.get("lr") if isinstance(values, Mapping) else None
    where = next((where for where, lr in given.items() if lr is not None), None)
    if where is None or not getattr(request.options, "relative_step", False):
        return None
    return (
        f"{where}={given[where]} together with optim={request.name!r} and relative_step=True, which computes the "
        f"learning rate itself. {'Set' if request.spec.kin else 'Leave lr out, or set'} "
        f"relative_step=False{_or_kin(request)}."
    )


def _parts_follow_a_function_of_the_step(request: Request) -> str | None:
    main = request.config.lr_scheduler
    if main is None or follows_the_step(main):
        return None
    for pattern, part in request.parts.items():
        if part.lr_scheduler is not None:
            return (
                f"lr_scheduler={main!r} together with the lr_scheduler of param_groups[{pattern!r}]: what does not "
                "follow from the number of the step is for all. Leave the pattern's out, or use lr_scheduler='linear'."
            )
        if REGISTRY.find(part.optim).averages_weights:
            return (
                f"lr_scheduler={main!r} together with optim={part.optim!r} in param_groups[{pattern!r}], which "
                "averages its iterates instead of following a schedule. Use lr_scheduler='linear' or 'cosine', which "
                "leave it alone."
            )
    return None


#: By code: see lightning_optim/refusals.
CONFIG_RULES: Mapping[str, Callable[[Request], str | None]] = {
    "LO401": _no_schedule_for_averages,
    "LO402": _warmup_has_an_effect,
    "LO403": _plateau_and_constant_do_not_warm_up,
    "LO404": _schedule_args_need_a_schedule,
    "LO405": _layer_pattern_needs_layer_decay,
    "LO406": _lr_is_known,
    "LO407": _weight_decay_exists,
    "LO408": _overrides_are_known,
    "LO409": _averages_need_a_learning_rate,
    "LO410": _target_modules_are_projected,
    "LO411": _relative_step_makes_the_learning_rate,
    "LO412": _parts_follow_a_function_of_the_step,
    "LO413": _demanding_ones_have_no_other_parts,
}
