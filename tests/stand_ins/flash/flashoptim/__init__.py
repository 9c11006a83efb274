"""FlashAdamW and FlashLion with upstream's signatures and habits, those that our adapter mends among them.

The original quantizes on a curve and corrects weights relative to their own spacing, in kernels for CUDA. Here both are
linear, in plain torch on any device: what is kept, in which type and under which key, is the original's.
"""

from types import MappingProxyType

import torch

_WIDTHS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
_BLOCK = 32


class _Quantized:
    """A state that is no tensor: codes of one byte, and a float16 scale for each block."""

    def __init__(self, signed, shape=None, device=None):
        self.signed = signed
        if shape is not None:
            self.write(torch.zeros(shape, device=device))

    def write(self, values):
        dtype, top = (torch.int8, 127) if self.signed else (torch.uint8, 255)
        padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
        self.scales = padded.abs().amax(1).clamp(1e-4, 6e4).half()
        codes = (padded / self.scales.float()[:, None] * top).round().clamp(-top, top)
        self.codes = codes.flatten()[: values.numel()].to(dtype).view(values.shape)

    def read(self):
        scales = self.scales.float().repeat_interleave(_BLOCK)[: self.codes.numel()].view(self.codes.shape)
        return self.codes.float() * scales / (127 if self.signed else 255)


class FlashOptimizer(torch.optim.Optimizer):
    quantized = MappingProxyType({})

    def __init__(
        self,
        params,
        lr,
        defaults,
        quantize,
        compress_state_dict,
        master_weight_bits,
        check_numerics,
        fused,
    ):
        if not (quantize and compress_state_dict and fused) or check_numerics:
            raise RuntimeError("not in the stand-in")
        self._width = {None: 0, 24: 3, 32: 4}[master_weight_bits]
        own = {"lr": lr, "initial_lr": lr, "master_bytewidth": self._width, "quantize": quantize}
        super().__init__(params, {**defaults, **own})
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        if master_weight_bits and all(parameter.dtype is torch.float32 for parameter in members):
            raise ValueError(f"master_weight_bits={master_weight_bits} has no effect when all parameters are fp32")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter, group):
        state = self.state[parameter]
        for key, signed in self.quantized.items():
            if key not in state:
                state[key] = _Quantized(signed, parameter.shape, parameter.device)
        extra = group["master_bytewidth"] - _WIDTHS[parameter.dtype]
        if extra > 0 and "error_bits" not in state:
            state["error_bits"] = torch.zeros_like(parameter, dtype={1: torch.int8, 2: torch.int16}[extra])
        self._count(state)
        if not parameter.numel():
            return
        if not parameter.is_contiguous() or not parameter.grad.is_contiguous():
            raise RuntimeError("fused kernels require contiguous parameters and gradients")
        error = state.get("error_bits")
        top = 127 if error is not None and error.dtype is torch.int8 else 32767
        spacing = parameter.float().abs() * torch.finfo(parameter.dtype).eps + 1e-20
        value = parameter.float() if error is None else parameter.float() + error.float() / top * spacing
        value = self._updated(value, parameter.grad.float(), state, group)
        parameter.copy_(value)
        if error is not None:
            spacing = parameter.float().abs() * torch.finfo(parameter.dtype).eps + 1e-20
            error.copy_(((value - parameter.float()) / spacing * top).round().clamp(-top, top))

    def _count(self, state):
        pass

    def state_dict(self):
        saved = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in saved["state"].items():
            plain = {}
            for key, value in state.items():
                dtype = parameters[index].dtype
                if isinstance(value, _Quantized):
                    # Bytes of bfloat16 for bfloat16 weights, so that torch's cast keeps them.
                    scales = value.scales.view(dtype) if dtype is torch.bfloat16 else value.scales
                    plain |= {f"{key}::quantized": value.codes, f"{key}::scales": scales}
                elif key == "error_bits":
                    plain[key] = value.to(dtype) if value.dtype is torch.int8 else value.view(dtype)
                else:
                    plain[key] = value
            saved["state"][index] = plain
        return saved

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def __setstate__(self, state):
        # By now torch has cast everything but the count of steps to the parameter's type.
        for group in state["param_groups"]:
            for parameter in group["params"]:
                if state["state"].get(parameter):
                    state["state"][parameter] = self._read(state["state"][parameter], parameter, group)
        super().__setstate__(state)

    def _read(self, saved, parameter, group):
        state = {key: value for key, value in saved.items() if "::" not in key}
        for key, signed in self.quantized.items():
            state[key] = _Quantized(signed)
            state[key].codes = saved[f"{key}::quantized"].to(torch.int8 if signed else torch.uint8)
            scales = saved[f"{key}::scales"]
            state[key].scales = scales.view(torch.float16) if scales.dtype is torch.bfloat16 else scales.half()
        if "error_bits" in state:
            extra = group["master_bytewidth"] - _WIDTHS[parameter.dtype]
            error = state["error_bits"]
            state["error_bits"] = error.to(torch.int8) if extra == 1 else error.view(torch.int16)
        return state


class FlashAdamW(FlashOptimizer):
    quantized = MappingProxyType({"exp_avg": True, "exp_avg_sq": False})

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        decouple_lr=False,
        quantize=True,
        compress_state_dict=True,
        master_weight_bits=24,
        check_numerics=False,
        fused=True,
    ):
        defaults = {"betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, lr, defaults, quantize, compress_state_dict, master_weight_bits, check_numerics, fused)

    def _count(self, state):
        state["step"] = state.get("step", torch.tensor(0)) + 1

    def _updated(self, value, gradient, state, group):
        (beta1, beta2), step = group["betas"], int(state["step"])
        mean = state["exp_avg"].read().lerp(gradient, 1 - beta1)
        # Its root is what is quantized.
        square = (state["exp_avg_sq"].read() ** 2).lerp(gradient**2, 1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
        value = value * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean / (1 - beta1**step) / denominator
        state["exp_avg"].write(mean)
        state["exp_avg_sq"].write(square.sqrt())
        return value


class FlashLion(FlashOptimizer):
    quantized = MappingProxyType({"exp_avg": True})

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0,
        decouple_lr=False,
        quantize=True,
        compress_state_dict=True,
        master_weight_bits=24,
        check_numerics=False,
        fused=True,
    ):
        defaults = {"betas": betas, "weight_decay": weight_decay}
        super().__init__(params, lr, defaults, quantize, compress_state_dict, master_weight_bits, check_numerics, fused)

    def _updated(self, value, gradient, state, group):
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].read()
        value = value * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean.lerp(gradient, 1 - beta1).sign()
        state["exp_avg"].write(mean.lerp(gradient, 1 - beta2))
        return value
