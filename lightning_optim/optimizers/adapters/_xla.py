"""``torch_xla.amp.syncfree.AdamW`` that always uses the kernel it is named for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_xla.amp import syncfree

from lightning_optim._compat.torch_xla import adam_step


class AdamW(syncfree.AdamW):
    """``torch_xla.amp.syncfree.AdamW`` with three fixes.

    Upstream uses its kernel, one XLA operation per parameter, only if ``step`` is given a ``found_inf``, and otherwise
    steps as ``torch.optim.AdamW``; no training framework passes one. Here the kernel is always used.

    The kernel computes in one dtype, and in bfloat16 ``1 - betas[1] ** step`` is zero: upstream turns bfloat16
    parameters into NaN. Here dtypes narrower than float32 are computed in float32 and rounded once, at the end.

    The state is that of ``torch.optim.AdamW``, tensor for tensor, and loading moves the counters to the parameters'
    device, so that checkpoints move freely between the two. Upstream leaves the counters on the host, which its kernel
    refuses, and keeps a third tensor that torch's state does not have.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, found_inf: Tensor | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns.

        Args:
            closure: Evaluates the model and returns the loss.
            found_inf: A 0-dim tensor; if it is nonzero, nothing changes. The host never reads it. ``None`` steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Shared by all parameters of a device: the host records every tensor it makes as an operation.
        shared: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in shared:
                    skip = torch.zeros((), device=device) if found_inf is None else found_inf.to(device, torch.float32)
                    shared[device] = skip, torch.empty(0, dtype=torch.float32, device=device)
                self._step_one(group, parameter, *shared[device])
        return loss

    def _step_one(self, group: dict[str, Any], parameter: Tensor, found_inf: Tensor, unused: Tensor) -> None:
        state = self.state[parameter]
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names})
        stored = [parameter, *(state[name] for name in names)]
        computed = [tensor.float() for tensor in stored]
        adam_step(
            found_inf,
            [state["step"]],
            [computed[0]],
            [parameter.grad.float()],  # type: ignore[union-attr]
            [computed[1]],
            [computed[2]],
            # The kernel wants a third moment even if it is not used.
            [computed[3] if group["amsgrad"] else unused],
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            use_adamw=True,
        )
        for kept, result in zip(stored, computed, strict=True):
            if kept is not result:
                kept.copy_(result)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if isinstance(parameter, Tensor) and "step" in state:
                # torch leaves its dtype and device as they were saved.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
