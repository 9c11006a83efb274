"""What of Hugging Face's arguments reaches which optimizer there: one row for each way of handing them on.

Its Trainer gives each optimizer some of ``adam_beta1``, ``adam_epsilon``, ``weight_decay`` and ``optim_args``, and
leaves out the others without a word. A test holds the rows to the optimizers that the installed transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_optim.table import SUFFIX


@dataclass(frozen=True)
class HandedOn:
    """What reaches an optimizer there.

    Attributes:
        betas: Whether ``adam_beta1`` and ``adam_beta2`` do.
        eps: Whether ``adam_epsilon`` does.
        decay: Whether ``weight_decay`` does.
        own_decay: The default of the class there, where it does not.
        options: The keys of ``optim_args`` that are read.
        lost: The keys that are read, but have no counterpart here.
        true: Those of ``options`` that any value, ``False`` too, makes true.
        fixed: Options that are not the defaults of the class here, written unless ``optim_args`` has them.
        clipped: Whether ``max_grad_norm`` has an effect.
        note: What stays different.
    """

    betas: bool = False
    eps: bool = False
    decay: bool = True
    own_decay: float = 0.0
    options: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    true: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    clipped: bool = True
    note: str = ""


_ADAM = HandedOn(betas=True, eps=True)
_TORCHAO = replace(_ADAM, options=("block_size", "bf16_stochastic_round"))
_ADEMAMIX = replace(_ADAM, options=("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"))
_LION = HandedOn(betas=True)
_RMSPROP_BNB = HandedOn(options=("alpha", "eps", "momentum", "centered"))
_SCHEDULE_FREE = ("weight_lr_power", "r")
_LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
_SUBSPACES = (
    "The subspaces are found by a randomized method; projection: svd in optim_args finds the exact ones, as there"
)
_GALORE = HandedOn(
    decay=False,
    options=_LOW_RANK,
    note=_SUBSPACES,
)
_LOMO = HandedOn(decay=False, clipped=False)

_ROWS: Mapping[tuple[str, ...], HandedOn] = {
    ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"): _ADAM,
    ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"): _ADAM,
    ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"): _ADEMAMIX,
    ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"): _LION,
    ("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"): _RMSPROP_BNB,
    ("adamw_torch_4bit",): replace(_TORCHAO, fixed={"block_size": 256}),
    ("adamw_torch_8bit",): _TORCHAO,
    ("adamw_anyprecision",): replace(
        _ADAM, options=("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype")
    ),
    ("sgd",): HandedOn(options=("momentum", "dampening", "nesterov")),
    ("adagrad",): HandedOn(options=("lr_decay", "eps")),
    ("rmsprop",): HandedOn(options=("momentum", "alpha", "eps", "centered")),
    ("adafactor",): HandedOn(),
    ("grokadamw",): HandedOn(
        options=("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate"),
        lost=("gradient_clipping",),
        note="there each gradient is clipped to a norm of gradient_clipping, 1.0 by default; here the Trainer clips",
    ),
    ("stable_adamw",): replace(
        _ADAM, options=("max_lr", "kahan_sum", "decouple_lr"), true=("kahan_sum", "decouple_lr")
    ),
    ("schedule_free_adamw",): replace(_ADAM, options=_SCHEDULE_FREE),
    ("schedule_free_radam",): replace(_ADAM, options=_SCHEDULE_FREE),
    ("schedule_free_sgd",): HandedOn(options=_SCHEDULE_FREE),
    ("galore_adamw",): replace(
        _GALORE,
        fixed={"match_galore_torch": True},
        note="match_galore_torch: true takes the epsilon used there, 1e-6 added to the uncorrected denominator; leave "
        f"it out for torch's, 1e-8 added to the corrected one. {_SUBSPACES}",
    ),
    ("galore_adamw_8bit",): replace(
        _GALORE,
        own_decay=0.01,
        note=f"weight_decay: 0.01 is the default of its class there, which decays biases and norms, too. {_SUBSPACES}",
    ),
    ("galore_adafactor",): _GALORE,
    ("apollo_adamw",): HandedOn(
        betas=True,
        eps=True,
        decay=False,
        options=(*_LOW_RANK, "proj", "scale_type"),
        note="adam_beta1, adam_beta2 and adam_epsilon reach the projected matrices alone there, all parameters here",
    ),
    ("lomo", "adalomo"): _LOMO,
}  # fmt: skip
_HANDED_ON = {name: row for names, row in _ROWS.items() for name in names}

#: Optimizers that transformers has dropped, and what comes nearest.
FORMER_OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_hf": (
        "adamw_torch",
        "its own AdamW, dropped since, adds epsilon to the uncorrected denominator and decays after the update",
    ),
}


def handed_on(optim: str) -> HandedOn:
    """Returns what reaches the optimizer ``optim``; of one that is not there, what reaches AdamW."""
    plain = optim.removesuffix(SUFFIX)
    row = _HANDED_ON.get(plain, _ADAM)
    return row if plain == optim else replace(row, clipped=False)
