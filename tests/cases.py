"""One case per row of the table: its reference class and hyperparameters with which it learns in a few steps.

``test_table.py`` fails if a row has no case or a case no row. The runners in ``test_training.py``,
``test_reference.py`` and ``test_resume.py`` do the same with every case.
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_optim import OptimizerSpec
from lightning_optim.table.rows import ROWS


@dataclass(frozen=True)
class Case:
    """How to test one row.

    Attributes:
        name: The identifier.
        upstream: The reference class, ``"package.module:Class"``, built with the same param groups: upstream's, or for
            an algorithm of ours the class itself, whose own tests compare it with its oracle.
        lr: A learning rate with which the test model learns in 30 steps.
        options: ``optim_args`` of the tests, and arguments of the upstream constructor, different from the defaults.
        takes: The identifier that it stands for on a CPU, if it stands for several.
    """

    name: str
    upstream: str
    lr: float = 1e-2
    options: dict[str, Any] = field(default_factory=dict)
    takes: str = ""

    @property
    def row(self) -> OptimizerSpec:
        """The row that is built on a CPU."""
        return next(row for row in ROWS if self.built in (row.name, *row.aliases))

    @property
    def arguments(self) -> dict[str, Any]:
        """What the row fixes of the upstream constructor's arguments."""
        return dict(self.row.fixed)

    @property
    def averages(self) -> bool:
        """Whether the optimizer has to be switched between training and evaluation."""
        return self.row.averages_weights

    @property
    def schedule(self) -> str | None:
        """An ``lr_scheduler`` for the tests, or ``None`` where the row takes none."""
        return None if self.averages else "linear"

    @property
    def projects(self) -> bool:
        """Whether it projects the gradients of linear layers."""
        return self.row.projects

    @property
    def in_backward(self) -> bool:
        """Whether it steps during backward without the suffix ``_layerwise``."""
        return self.row.layerwise

    @property
    def built(self) -> str:
        """The identifier whose row is built on a CPU."""
        return self.takes or self.name

    @property
    def plain(self) -> str:
        """The identifier that steps it after backward."""
        return self.upstream.replace(":", ".") if self.in_backward else self.name

    @property
    def layerwise(self) -> str:
        """The identifier that steps it during backward."""
        return f"{self.name}_layerwise"

    @property
    def forms(self) -> tuple[str, ...]:
        """The identifiers of its forms: plain, and layerwise if its parameters can be stepped one by one."""
        return (self.plain,) if self.row.coupled else (self.plain, self.layerwise)

    def load(self) -> type[Optimizer]:
        module, _, attribute = self.upstream.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _bnb(name: str, algorithm: str, **kwargs: Any) -> Case:
    return Case(name, f"bitsandbytes.optim:{algorithm}", **kwargs)


def _own(name: str, path: str, **kwargs: Any) -> Case:
    return Case(name, f"lightning_optim.{path}", **kwargs)


_BETAS = {"betas": (0.8, 0.95)}
_THREE_BETAS = {"betas": (0.8, 0.95, 0.99), "alpha": 2.0, "t_alpha": 10, "t_beta3": 10}
# Several projections within the 20 steps of the tests, before and after a checkpoint.
_GALORE = {"rank": 8, "update_proj_gap": 7, "scale": 1.0}

CASES = (
    Case("adamw", "torch.optim:AdamW", options=_BETAS, takes="adamw_torch_fused"),
    Case("adamw_torch", "torch.optim:AdamW", options=_BETAS),
    Case("adamw_torch_fused", "torch.optim:AdamW", options=_BETAS),
    Case("adamw_torch_4bit", "torchao.optim:AdamW4bit", options=_BETAS),
    Case("adamw_torch_8bit", "torchao.optim:AdamW8bit", options=_BETAS),
    Case("adamw_torch_fp8", "torchao.optim:AdamWFp8", options=_BETAS),
    _bnb("adamw_bnb_8bit", "AdamW", options=_BETAS),
    _bnb("adamw_8bit", "AdamW", options=_BETAS),
    _bnb("paged_adamw_32bit", "AdamW", options=_BETAS),
    _bnb("paged_adamw_8bit", "AdamW", options=_BETAS),
    _bnb("lion_32bit", "Lion", lr=3e-3, options=_BETAS),
    _bnb("lion_8bit", "Lion", lr=3e-3, options=_BETAS),
    _bnb("paged_lion_32bit", "Lion", lr=3e-3, options=_BETAS),
    _bnb("paged_lion_8bit", "Lion", lr=3e-3, options=_BETAS),
    _bnb("ademamix", "AdEMAMix", options=_THREE_BETAS),
    _bnb("ademamix_8bit", "AdEMAMix", options=_THREE_BETAS),
    _bnb("paged_ademamix_32bit", "AdEMAMix", options=_THREE_BETAS),
    _bnb("paged_ademamix_8bit", "AdEMAMix", options=_THREE_BETAS),
    _bnb("rmsprop_bnb", "RMSprop", options={"alpha": 0.9}),
    _bnb("rmsprop_bnb_32bit", "RMSprop", options={"alpha": 0.9}),
    _bnb("rmsprop_bnb_8bit", "RMSprop", options={"alpha": 0.9}),
    _own("adamw_anyprecision", "optimizers:AnyPrecisionAdamW", options={"use_kahan_summation": True}),
    _own("galore_adamw", "optimizers:GaLoreAdamW", options=_GALORE),
    _own(
        "galore_adamw_8bit",
        "optimizers:GaLoreAdamW8bit",
        options={**_GALORE, "min_8bit_size": 256},
    ),
    _own("galore_adafactor", "optimizers:GaLoreAdafactor", options=_GALORE),
    _own(
        "apollo_mini",
        "optimizers:ApolloAdamW",
        options={"rank": 1, "scale": 64.0, "scale_type": "tensor", "update_proj_gap": 7},
    ),
    _own("apollo_adamw", "optimizers:ApolloAdamW", options={"rank": 8, "update_proj_gap": 7}),
    _own("adafactor", "optimizers:Adafactor", options={"beta1": 0.9}),
    _own("lomo", "optimizers:LOMO", lr=1.0),
    _own("adalomo", "optimizers:AdaLomo", lr=3e-2, options={"clip_threshold": 0.9}),
    _own("grokadamw", "optimizers:GrokAdamW", lr=3e-3, options={"betas": (0.8, 0.95), "gamma": 0.05}),
    _own("adopt", "optimizers:Adopt", options={"betas": (0.8, 0.95)}),
    _own("adan", "optimizers:Adan", options={"betas": (0.9, 0.8, 0.95)}),
    _own("adam_mini", "optimizers:AdamMini", options=_BETAS),
    _own("came", "optimizers:CAME", lr=3e-3, options={"betas": (0.8, 0.95, 0.99)}),
    _own("lamb", "optimizers:Lamb", options=_BETAS),
    _own("lars", "optimizers:Lars", lr=1.0, options={"momentum": 0.8, "trust_coeff": 1e-2}),
    _own("muon", "optimizers:Muon", lr=2e-2, options={"momentum": 0.9, "ns_steps": 4}),
    _own("normuon", "optimizers:NorMuon", lr=2e-2, options={"beta2": 0.9, "lr_scale": "match_rms_adamw"}),
    _own("prodigy", "optimizers:Prodigy", lr=1.0, options={"betas": (0.8, 0.95), "d0": 1e-3, "growth_rate": 1.5}),
    _own("scale", "optimizers:Scale", options={"momentum": 0.5, "eps": 1e-6}),
    _own("soap", "optimizers:SOAP", options={"betas": (0.9, 0.95), "precondition_frequency": 4}),
    Case("sgd", "torch.optim:SGD", lr=0.3, options={"momentum": 0.9, "nesterov": True}),
    Case("adagrad", "torch.optim:Adagrad", lr=0.1, options={"lr_decay": 1e-3}),
    Case("rmsprop", "torch.optim:RMSprop", options={"alpha": 0.9, "momentum": 0.5, "centered": True}),
    # Its Triton kernel adds atomically, on a GPU in any order: the tests that compare bits go without it.
    Case("stable_adamw", "optimi:StableAdamW", options={**_BETAS, "triton": False}),
    Case("schedule_free_radam", "schedulefree:RAdamScheduleFree", lr=3e-2, options=_BETAS),
    Case("schedule_free_adamw", "schedulefree:AdamWScheduleFree", lr=3e-2, options=_BETAS),
    Case("schedule_free_sgd", "schedulefree:SGDScheduleFree", lr=3.0, options={"r": 1.0}),
)
BY_NAME = {case.name: case for case in CASES}
NAMES = tuple(BY_NAME)
#: One name for each class: the last, which quantizes where the class can. For what does not depend on the arguments.
KINDS = tuple({case.upstream: case.name for case in CASES}.values())
#: The names that have a layerwise form.
LAYERWISE = tuple(name for name in NAMES if not BY_NAME[name].row.coupled)


def in_modes(modes: Iterable[str], for_all: Container[str], names: Container[str] = NAMES) -> list[tuple[str, str]]:
    """Returns (name, mode) of every name in the modes ``for_all``, and of one name of each class in the others."""
    return [(name, mode) for mode in modes for name in (NAMES if mode in for_all else KINDS) if name in names]


# Rows for devices that a CPU does not stand in for, and the package that brings them. Their tests: tests/xla,
# test_npu.py, test_apex.py, test_flash.py.
ELSEWHERE = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_apex_fused": "amp_C",
    "flash_adamw": "flashoptim",
    "flash_lion": "flashoptim",
}


def case_of(identifier: str) -> Case:
    """Returns the case whose row ``identifier`` names, in whichever form."""
    return next(case for case in CASES if identifier in (case.name, case.plain, case.layerwise))
