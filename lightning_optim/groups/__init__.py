"""From named parameters and a policy to param groups: every trainable parameter lands in exactly one.

What decays, what is projected, which learning rate a layer gets. No optimizer is named here.
"""

from __future__ import annotations

from lightning_optim.groups._hidden import Hidden, all_matrices, hidden_matrices
from lightning_optim.groups._layer_decay import numbered_stacks
from lightning_optim.groups._param_groups import GroupPolicy, first_matches, make_groups, make_unique, override_keys
from lightning_optim.groups._parameters import (
    NamedParameter,
    Target,
    device_types,
    every_parameter,
    named_parameters,
    trainable,
)
from lightning_optim.groups._target_modules import TargetModules, check_target_modules, left_out

__all__ = [
    "GroupPolicy",
    "Hidden",
    "NamedParameter",
    "Target",
    "TargetModules",
    "all_matrices",
    "check_target_modules",
    "device_types",
    "every_parameter",
    "first_matches",
    "hidden_matrices",
    "left_out",
    "make_groups",
    "make_unique",
    "named_parameters",
    "numbered_stacks",
    "override_keys",
    "trainable",
]
