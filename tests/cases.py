"""One case per row of the table: its reference class and hyperparameters with which it learns in a few steps.

``test_table.py`` fails if a row has no case or a case no row. The runners in ``test_training.py``,
``test_reference.py`` and ``test_resume.py`` do the same with every case.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer


@dataclass(frozen=True)
class Case:
    """How to test one row.

    Attributes:
        name: The identifier.
        upstream: The reference class, ``"package.module:Class"``, built with the same param groups: upstream's, or for
            an algorithm of ours the class itself, whose own tests compare it with its oracle.
        arguments: What the row fixes, spelled as the upstream constructor's arguments.
        lr: A learning rate with which the test model learns in 30 steps.
        options: ``optim_args`` of the tests, and arguments of the upstream constructor, different from the defaults.
        averages: True if the optimizer has to be switched between training and evaluation.
        schedule: An ``lr_scheduler`` for the tests, or ``None`` where the row takes none.
        projects: True if it projects the gradients of linear layers.
        in_backward: True if the row steps during backward without the suffix ``_layerwise``.
        takes: The identifier that it stands for on a CPU, if it stands for several.
    """

    name: str
    upstream: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    options: dict[str, Any] = field(default_factory=dict)
    averages: bool = False
    schedule: str | None = "linear"
    projects: bool = False
    in_backward: bool = False
    takes: str = ""

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

    def load(self) -> type[Optimizer]:
        module, _, attribute = self.upstream.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _bnb(name: str, algorithm: str, bits: int, paged: bool | None, **kwargs: Any) -> Case:
    arguments = {"optim_bits": bits} if paged is None else {"optim_bits": bits, "is_paged": paged}
    return Case(name, f"bitsandbytes.optim:{algorithm}", arguments, **kwargs)


def _own(name: str, path: str, **kwargs: Any) -> Case:
    return Case(name, f"lightning_optim.{path}", **kwargs)


_BETAS = {"betas": (0.8, 0.95)}
_THREE_BETAS = {"betas": (0.8, 0.95, 0.99), "alpha": 2.0, "t_alpha": 10, "t_beta3": 10}
# Several projections within the 20 steps of the tests, before and after a checkpoint.
_GALORE = {"rank": 8, "update_proj_gap": 7, "scale": 1.0}

CASES = (
    Case("adamw", "torch.optim:AdamW", {"fused": True}, options=_BETAS, takes="adamw_torch_fused"),
    Case("adamw_torch", "torch.optim:AdamW", options=_BETAS),
    Case("adamw_torch_fused", "torch.optim:AdamW", {"fused": True}, options=_BETAS),
    Case("adamw_torch_4bit", "torchao.optim:AdamW4bit", options=_BETAS),
    Case("adamw_torch_8bit", "torchao.optim:AdamW8bit", options=_BETAS),
    _bnb("adamw_bnb_8bit", "AdamW", 8, False, options=_BETAS),
    _bnb("adamw_8bit", "AdamW", 8, False, options=_BETAS),
    _bnb("paged_adamw_32bit", "AdamW", 32, True, options=_BETAS),
    _bnb("paged_adamw_8bit", "AdamW", 8, True, options=_BETAS),
    _bnb("lion_32bit", "Lion", 32, False, lr=3e-3, options=_BETAS),
    _bnb("lion_8bit", "Lion", 8, False, lr=3e-3, options=_BETAS),
    _bnb("paged_lion_32bit", "Lion", 32, True, lr=3e-3, options=_BETAS),
    _bnb("paged_lion_8bit", "Lion", 8, True, lr=3e-3, options=_BETAS),
    _bnb("ademamix", "AdEMAMix", 32, False, options=_THREE_BETAS),
    _bnb("ademamix_8bit", "AdEMAMix", 8, False, options=_THREE_BETAS),
    _bnb("paged_ademamix_32bit", "AdEMAMix", 32, True, options=_THREE_BETAS),
    _bnb("paged_ademamix_8bit", "AdEMAMix", 8, True, options=_THREE_BETAS),
    _bnb("rmsprop_bnb", "RMSprop", 32, None, options={"alpha": 0.9}),
    _bnb("rmsprop_bnb_32bit", "RMSprop", 32, None, options={"alpha": 0.9}),
    _bnb("rmsprop_bnb_8bit", "RMSprop", 8, None, options={"alpha": 0.9}),
    _own("adamw_anyprecision", "optimizers:AnyPrecisionAdamW", options={"use_kahan_summation": True}),
    _own("galore_adamw", "optimizers:GaLoreAdamW", options=_GALORE, projects=True),
    _own(
        "galore_adamw_8bit",
        "optimizers:GaLoreAdamW8bit",
        options={**_GALORE, "min_8bit_size": 256},
        projects=True,
    ),
    _own("galore_adafactor", "optimizers:GaLoreAdafactor", options=_GALORE, projects=True),
    _own("apollo_adamw", "optimizers:ApolloAdamW", options={"rank": 8, "update_proj_gap": 7}, projects=True),
    _own("adafactor", "optimizers:Adafactor", options={"beta1": 0.9}),
    _own("lomo", "optimizers:LOMO", lr=1.0, in_backward=True),
    _own("adalomo", "optimizers:AdaLomo", lr=3e-2, options={"clip_threshold": 0.9}, in_backward=True),
    _own("grokadamw", "optimizers:GrokAdamW", lr=3e-3, options={"betas": (0.8, 0.95), "gamma": 0.05}),
    Case("sgd", "torch.optim:SGD", lr=0.3, options={"momentum": 0.9, "nesterov": True}),
    Case("adagrad", "torch.optim:Adagrad", lr=0.1, options={"lr_decay": 1e-3}),
    Case("rmsprop", "torch.optim:RMSprop", options={"alpha": 0.9, "momentum": 0.5, "centered": True}),
    # Its Triton kernel adds atomically, on a GPU in any order: the tests that compare bits go without it.
    Case("stable_adamw", "optimi:StableAdamW", options={**_BETAS, "triton": False}),
    Case(
        "schedule_free_radam", "schedulefree:RAdamScheduleFree", lr=3e-2, options=_BETAS, averages=True, schedule=None
    ),
    Case(
        "schedule_free_adamw", "schedulefree:AdamWScheduleFree", lr=3e-2, options=_BETAS, averages=True, schedule=None
    ),
    Case("schedule_free_sgd", "schedulefree:SGDScheduleFree", lr=3.0, options={"r": 1.0}, averages=True, schedule=None),
)
BY_NAME = {case.name: case for case in CASES}
NAMES = tuple(BY_NAME)
#: One name for each class: the last, which quantizes where the class can. For what does not depend on the arguments.
KINDS = tuple({case.upstream: case.name for case in CASES}.values())

# Rows for devices that a CPU does not stand in for, and the package that brings them. Their tests: tests/xla,
# test_npu.py, test_apex.py.
ELSEWHERE = {"adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu", "adamw_apex_fused": "amp_C"}


def case_of(identifier: str) -> Case:
    """Returns the case whose row ``identifier`` names, in whichever form."""
    return next(case for case in CASES if identifier in (case.name, case.plain, case.layerwise))
