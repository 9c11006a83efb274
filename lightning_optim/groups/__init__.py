"""From named parameters and a policy to param groups: every trainable parameter lands in exactly one.

What decays, what is projected, which learning rate a layer gets. No optimizer is named here.
"""

from __future__ import annotations

from lightning_optim.groups._param_groups import GroupPolicy, make_groups, override_keys
from lightning_optim.groups._parameters import NamedParameter, Target, device_types, named_parameters
from lightning_optim.groups._target_modules import TargetModules, check_target_modules, left_out

__all__ = [
    "GroupPolicy",
    "NamedParameter",
    "Target",
    "TargetModules",
    "check_target_modules",
    "device_types",
    "left_out",
    "make_groups",
    "named_parameters",
    "override_keys",
]
