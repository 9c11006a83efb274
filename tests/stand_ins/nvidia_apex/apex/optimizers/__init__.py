"""FusedAdam with upstream's signature and its habits, those that our adapter mends among them."""

import amp_C
import torch

_CHUNK = 2048 * 32


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        if amsgrad or capturable or master_weights:
            raise RuntimeError("not in the stand-in")
        super().__init__(
            params,
            {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )
        self.adam_w_mode = int(adam_w_mode)
        self.set_grad_none = set_grad_none
        self.capturable = capturable
        self.master_weights = master_weights
        # Made once: groups that are added later are not in it.
        self.param_groups_master = [{"params": [None for _ in group["params"]]} for group in self.param_groups]
        # The original's lies on CUDA.
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)
        self.multi_tensor_adam = amp_C.multi_tensor_adam

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.set_grad_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("arguments of former times")
        loss = closure() if closure is not None else None
        for group, master in zip(self.param_groups, self.param_groups_master, strict=False):
            if not group["params"]:
                continue
            # Whether or not its parameters have gradients.
            group["step"] = group.get("step", 0) + 1
            lists = {torch.float16: [], torch.bfloat16: [], torch.float32: []}
            for parameter, _ in zip(group["params"], master["params"], strict=False):
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("no sparse gradients")
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data).float()
                if parameter.dtype not in lists:
                    raise RuntimeError("only fp16, bf16 and fp32")
                lists[parameter.dtype].append(
                    (parameter.grad.data, parameter.data, state["exp_avg"], state["exp_avg_sq"])
                )
            for tensors in lists.values():
                if tensors:
                    self.multi_tensor_adam(
                        _CHUNK,
                        self._dummy_overflow_buf,
                        [list(column) for column in zip(*tensors, strict=True)],
                        group["lr"],
                        *group["betas"],
                        group["eps"],
                        group["step"],
                        self.adam_w_mode,
                        int(group["bias_correction"]),
                        group["weight_decay"],
                    )
        return loss
