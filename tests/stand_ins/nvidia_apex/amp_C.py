"""The kernel's arithmetic and what it demands of its tensors, in plain torch on any device."""

import torch

#: The number of tensors of every call.
calls = []

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


# The original writes to addresses, past autograd.
@torch.no_grad()
def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    assert noop_flag.dtype is torch.int
    assert isinstance(step, int)
    assert len(tensor_lists) == 4
    assert len({len(tensors) for tensors in tensor_lists}) == 1
    calls.append(len(tensor_lists[0]))
    device = tensor_lists[0][0].device
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for tensors in zip(*tensor_lists, strict=True):
        for tensor in tensors:
            if not any(tensor.is_contiguous(memory_format=format) for format in _FORMATS):
                raise RuntimeError("A tensor was not contiguous.")
            assert tensor.device == device
        # The original reads float32 at these addresses, whatever is there.
        assert tensors[2].dtype is tensors[3].dtype is torch.float32
        # In the order of memory, not of indices.
        grad, weight, mean, square = (
            tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()) for tensor in tensors
        )
        grad, value = grad.float(), weight.float()
        if not mode:
            grad = grad + weight_decay * value
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        update = (mean / first) / ((square / second).sqrt() + epsilon)
        if mode:
            update = update + weight_decay * value
        weight.copy_(value - lr * update)
