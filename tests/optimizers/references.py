"""The algorithms that we own as they are published: plain torch, one parameter at a time, at most 25 lines each.

Each is named as the identifier. It takes a weight, its gradients, one per step, and what the optimizer's param group
holds, and returns the weight after the last step. ``test_references.py`` steps the classes with the same gradients.
What a reference leaves out (stacks of matrices, other sides to project, zero gradients) has a test of its own.

Bases and random projections have to be those of the class, or nothing could be compared: singular vectors come from
``torch.linalg.svd`` on both sides, random numbers from the class's own generator, by the seed that its state holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace as Group

import torch
from torch import Tensor

from lightning_optim.optimizers._projection import gaussian

Gradients = Sequence[Tensor]


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def bases(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """GaLore's: the leading singular vectors of the shorter side; the other basis is the identity."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    rows, columns = (torch.eye(side, dtype=gradient.dtype) for side in gradient.shape)
    return (rows, right[:rank].T) if gradient.shape[0] >= gradient.shape[1] else (left[:, :rank], columns)


def lomo(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2306.09782, equation 1, with decoupled decay."""
    for gradient in gradients:
        weight = weight - group.lr * group.weight_decay * weight - group.lr * gradient
    return weight


def adafactor(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/1804.04235, algorithms 4 and 5; a first moment averages the scaled updates."""
    row = column = full = average = torch.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        beta2 = 1 - t**group.decay_rate
        squares = gradient**2 + group.eps[0]
        if gradient.ndim > 1:
            row = beta2 * row + (1 - beta2) * squares.sum(-1, keepdim=True)
            column = beta2 * column + (1 - beta2) * squares.sum(-2, keepdim=True)
            update = gradient / (row * column / row.sum(-2, keepdim=True)).sqrt()
        else:
            full = beta2 * full + (1 - beta2) * squares
            update = gradient / full.sqrt()
        relative = min(1e-6 * t if group.warmup_init else 1e-2, 1 / math.sqrt(t)) if group.relative_step else 1.0
        rate = group.lr * relative * (max(group.eps[1], rms(weight)) if group.scale_parameter else 1.0)
        update = rate * update / max(1.0, rms(update) / group.clip_threshold)
        beta1 = group.beta1 or 0.0
        average = beta1 * average + (1 - beta1) * update
        weight = weight - rate * group.weight_decay * weight - average
    return weight


def adalomo(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2310.10195, algorithm 1; its second moment decays as Adafactor's."""
    row = column = torch.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        matrix = gradient if gradient.ndim > 1 else gradient[None]
        beta = 1 - t**group.decay_rate
        row = beta * row + (1 - beta) * matrix.square().sum(-1, keepdim=True)
        column = beta * column + (1 - beta) * matrix.square().sum(-2, keepdim=True)
        update = matrix / (row * column / row.sum(-2, keepdim=True)).sqrt()
        update = update.view_as(weight) / max(1.0, rms(update) / group.clip_threshold)
        rate = group.lr * max(group.eps[1], rms(weight))
        weight = weight - rate * group.weight_decay * weight - rate * update
    return weight


def came(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2307.02047, algorithm 2; a vector has the update's average alone."""
    row = column = full = scatter_row = scatter_column = torch.zeros(())
    (beta1, beta2, beta3), average = group.betas, torch.zeros_like(weight)
    for gradient in gradients:
        squares = gradient**2 + group.eps[0]
        if gradient.ndim < 2:
            full = beta2 * full + (1 - beta2) * squares
            update = gradient / full.sqrt()
        else:
            row = beta2 * row + (1 - beta2) * squares.sum(-1, keepdim=True)
            column = beta2 * column + (1 - beta2) * squares.sum(-2, keepdim=True)
            update = gradient / (row * column / row.sum(-2, keepdim=True)).sqrt()
        update = update / max(1.0, rms(update) / group.clip_threshold)
        average = beta1 * average + (1 - beta1) * update
        scatter, moved = (update - average) ** 2 + group.eps[1], average
        if gradient.ndim > 1:
            scatter_row = beta3 * scatter_row + (1 - beta3) * scatter.sum(-1, keepdim=True)
            scatter_column = beta3 * scatter_column + (1 - beta3) * scatter.sum(-2, keepdim=True)
            moved = average / (scatter_row * scatter_column / scatter_row.sum(-2, keepdim=True)).sqrt()
        weight = weight - group.lr * group.weight_decay * weight - group.lr * moved
    return weight


def galore_adamw(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2403.03507, algorithm 2, with AdamW's decay."""
    first = second = torch.zeros(())
    beta1, beta2 = group.betas
    for t, gradient in enumerate(gradients, start=1):
        if (t - 1) % group.update_proj_gap == 0:
            left, right = bases(gradient, group.rank)
        low = left.T @ gradient @ right
        first = beta1 * first + (1 - beta1) * low
        second = beta2 * second + (1 - beta2) * low**2
        normed = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)
        weight = weight - group.lr * group.weight_decay * weight
        weight = weight - group.lr * group.scale * left @ normed @ right.T
    return weight


def galore_adafactor(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2403.03507, section 4.2: Adafactor, without its first moment, in the subspace."""
    row = column = torch.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        if (t - 1) % group.update_proj_gap == 0:
            left, right = bases(gradient, group.rank)
        low = left.T @ gradient @ right
        beta2 = 1 - t**group.decay_rate
        row = beta2 * row + (1 - beta2) * (low**2 + group.eps[0]).sum(1, keepdim=True)
        column = beta2 * column + (1 - beta2) * (low**2 + group.eps[0]).sum(0, keepdim=True)
        update = low / (row * column / row.sum()).sqrt()
        update = update / max(1.0, rms(update) / group.clip_threshold)
        weight = weight - group.lr * group.weight_decay * weight
        weight = weight - group.lr * group.scale * left @ update @ right.T
    return weight


def apollo_adamw(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2412.05270, algorithm 1, for ``[m, n]`` with ``m < n``; any other is transposed."""
    if turned := weight.shape[0] >= weight.shape[1]:
        weight, gradients = weight.T, [gradient.T for gradient in gradients]
    first = second = torch.zeros(())
    (beta1, beta2), last = group.betas, math.inf
    for t, gradient in enumerate(gradients, start=1):
        if (t - 1) % group.update_proj_gap == 0:
            seed = group.seed + (t - 1) // group.update_proj_gap
            projection = gaussian(seed, len(weight), group.rank, weight).T / math.sqrt(group.rank)
        low = projection @ gradient
        first = beta1 * first + (1 - beta1) * low
        second = beta2 * second + (1 - beta2) * low**2
        normed = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)
        channel = None if group.scale_type == "tensor" else 0
        update = gradient * normed.norm(dim=channel) / low.norm(dim=channel)
        if group.norm_growth_limit and update.norm() > group.norm_growth_limit * last:
            update *= group.norm_growth_limit * last / update.norm()
        last = update.norm().item()
        weight = weight - group.lr * group.weight_decay * weight - group.lr * math.sqrt(group.scale) * update
    return weight.T if turned else weight


def grokadamw(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """The package's algorithm, mended as the class says, for the parameter at ``position`` of its group."""
    excess = 0.0 if group.eval_loss is None else max(0.0, 1 - group.train_loss / group.eval_loss)
    alpha = group.alpha_init * math.exp(-group.grokking_signal_decay_rate * excess)
    beta1, beta2 = group.betas[0] * (1 - group.gamma) ** group.position, group.betas[1]
    first = second = slow = torch.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        slow = alpha * slow + (1 - alpha) * gradient
        amplified = gradient + group.lamb * slow
        first = beta1 * first + (1 - beta1) * amplified
        second = beta2 * second + (1 - beta2) * amplified**2
        weight = weight - group.lr * group.weight_decay * weight
        weight = weight - group.lr * first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)
    return weight


def adopt(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2411.02853, algorithm 2, with AdamW's decay."""
    (beta1, beta2), first, second = group.betas, torch.zeros_like(weight), gradients[0] ** 2
    for t, gradient in enumerate(gradients[1:], start=1):
        normed = gradient / second.sqrt().clamp(min=group.eps)
        if group.clip_exp is not None:
            normed = normed.clamp(-(t**group.clip_exp), t**group.clip_exp)
        first = beta1 * first + (1 - beta1) * normed
        weight = weight - group.lr * group.weight_decay * weight - group.lr * first
        second = beta2 * second + (1 - beta2) * gradient**2
    return weight


def adam_mini(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2406.16793, algorithm 1, whose blocks are rows, or as many as the group says."""
    first, second, (beta1, beta2) = torch.zeros_like(weight), torch.zeros(()), group.betas
    blocks = group.blocks or (len(weight) if weight.ndim > 1 else 1)
    for t, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        means = torch.stack([block.square().mean() for block in gradient.flatten().chunk(blocks)])
        second = beta2 * second + (1 - beta2) * means
        normed = first.reshape(blocks, -1) / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)[:, None]
        weight = weight - group.lr * group.weight_decay * weight - group.lr * normed.view_as(weight)
    return weight


def adan(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2208.06677, algorithm 1 with bias correction, and betas for 1 - betas."""
    first = difference = second = torch.zeros_like(weight)
    (beta1, beta2, beta3), previous = group.betas, gradients[0]
    for t, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        difference = beta2 * difference + (1 - beta2) * (gradient - previous)
        second = beta3 * second + (1 - beta3) * (gradient + beta2 * (gradient - previous)) ** 2
        rate = group.lr / ((second / (1 - beta3**t)).sqrt() + group.eps)
        update = rate * (first / (1 - beta1**t) + beta2 * difference / (1 - beta2**t))
        if group.no_prox:
            weight = weight - group.lr * group.weight_decay * weight - update
        else:
            weight = (weight - update) / (1 + group.lr * group.weight_decay)
        previous = gradient
    return weight


def lamb(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/1904.00962, algorithm 2, whose phi is the identity."""
    first = second = torch.zeros_like(weight)
    beta1, beta2 = group.betas
    for t, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        normed = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)
        update = normed + group.weight_decay * weight
        if group.adapt == "all" or (group.adapt == "matrices" and weight.ndim > 1):
            trust = weight.norm() / update.norm()
            update = update * (trust.clamp(max=1) if group.trust_clip else trust)
        weight = weight - group.lr * update
    return weight


def lars(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/1708.03888, algorithm 1, with the rate outside of the momentum."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        update = gradient + group.weight_decay * weight
        if group.adapt == "all" or (group.adapt == "matrices" and weight.ndim > 1):
            update *= group.trust_coeff * weight.norm() / (gradient.norm() + group.weight_decay * weight.norm())
        velocity = group.momentum * velocity + update
        weight = weight - group.lr * (update + group.momentum * velocity if group.nesterov else velocity)
    return weight


def newton_schulz(matrix: Tensor, group: Group) -> Tensor:
    """https://kellerjordan.github.io/posts/muon/"""
    a, b, c = group.ns_coefficients
    found = matrix / max(matrix.norm().item(), group.eps)
    for _ in range(group.ns_steps):
        gram = found @ found.T
        found = a * found + b * gram @ found + c * gram @ gram @ found
    return found


def muon(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """The same page; the other scale is that of https://arxiv.org/abs/2502.16982, section 2.2."""
    momentum, (m, n) = torch.zeros_like(weight), weight.shape
    scale = math.sqrt(max(1, m / n)) if group.lr_scale == "original" else 0.2 * math.sqrt(max(m, n))
    for gradient in gradients:
        momentum = group.momentum * momentum + (1 - group.momentum) * gradient
        average = group.momentum * momentum + (1 - group.momentum) * gradient if group.nesterov else momentum
        update = newton_schulz(average, group)
        decayed = weight * (update * weight >= 0) if group.cautious else weight
        weight = weight - group.lr * group.weight_decay * decayed - group.lr * scale * update
    return weight


def normuon(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2510.05491, algorithm 1, scaled to the norm before as its authors' code is."""
    momentum, second, (m, n) = torch.zeros_like(weight), torch.zeros(()), weight.shape
    for gradient in gradients:
        momentum = group.momentum * momentum + (1 - group.momentum) * gradient
        average = group.momentum * momentum + (1 - group.momentum) * gradient
        update = newton_schulz(average, group)
        second = group.beta2 * second + (1 - group.beta2) * update.square().mean(1, keepdim=True)
        normed = update / second.sqrt()
        update = normed * update.norm() / normed.norm()
        weight = weight - group.lr * (group.weight_decay * weight + math.sqrt(max(1, m / n)) * update)
    return weight


def scale(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2506.16659, algorithm 1, with root mean squares as its authors' code has them."""
    average, inputs = torch.zeros_like(weight), 0 if group.outputs == "columns" else 1
    for gradient in gradients:
        average = group.momentum * average + (1 - group.momentum) * gradient
        update = average / average.square().mean(inputs, keepdim=True).sqrt()
        weight = weight - group.lr * group.weight_decay * weight - group.lr * update
    return weight


def prodigy(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2306.06101, algorithm 4, for all parameters as one vector."""
    first = second = total = torch.zeros_like(weight)
    (beta1, beta2), distance, most, numerator, start = group.betas, group.d0, group.d0, 0.0, weight
    beta3 = group.beta3 or math.sqrt(beta2)
    for t, gradient in enumerate(gradients, start=1):
        rate = distance * group.lr
        if group.use_bias_correction:
            rate *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        numerator = beta3 * numerator + distance * rate * (gradient @ (start - weight)).item()
        total = beta3 * total + distance * (distance if group.safeguard_warmup else rate) * gradient
        first = beta1 * first + (1 - beta1) * distance * gradient
        second = beta2 * second + (1 - beta2) * distance**2 * gradient**2
        weight = weight - rate * group.weight_decay * weight
        weight = weight - rate * first / (second.sqrt() + distance * group.eps)
        made = group.d_coef * numerator / total.abs().sum().item()
        now = max(distance, made) if distance == group.d0 else distance
        most = max(most, made)
        distance = min(most, now * (group.growth_rate or math.inf))
    return weight


def soap(weight: Tensor, gradients: Gradients, group: Group) -> Tensor:
    """https://arxiv.org/abs/2409.11321, algorithm 3, whose first step sets the bases as its authors' code does."""
    first, second, (beta1, beta2) = torch.zeros_like(weight), torch.zeros_like(weight), group.betas
    beta, grams, bases = group.shampoo_beta or beta2, [torch.zeros(())] * 2, [torch.zeros(())] * 2
    for t, gradient in enumerate(gradients):
        left, right = bases
        if t > 0:
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * (left.T @ gradient @ right) ** 2
            normed = left.T @ first @ right / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group.eps)
            weight = weight - group.lr * group.weight_decay * weight - group.lr * left @ normed @ right.T
        for side, outer in enumerate((gradient @ gradient.T, gradient.T @ gradient)):
            grams[side] = beta * grams[side] + (1 - beta) * outer
            if t == 0:
                bases[side] = torch.linalg.eigh(grams[side])[1].flip(1)
            elif t % group.precondition_frequency == 0:
                powered = grams[side] @ bases[side]
                order = (bases[side] * powered).sum(0).argsort(descending=True)
                second, bases[side] = second.index_select(side, order), torch.linalg.qr(powered[:, order])[0]
    return weight


def adamw_anyprecision(weight: Tensor, gradients: Gradients, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchdistx's algorithm, which rounds in place to each tensor's dtype; returns what is kept, too."""
    (beta1, beta2), weight = group.betas, weight.clone()
    names = group.momentum_dtype, group.variance_dtype, group.compensation_buffer_dtype
    first, second, lost = (torch.zeros_like(weight, dtype=getattr(torch, name)) for name in names)
    for t, gradient in enumerate(gradients, start=1):
        weight *= 1 - group.lr * group.weight_decay
        first *= beta1
        first.add_(gradient, alpha=1 - beta1)
        second *= beta2
        second.addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt() / math.sqrt(1 - beta2**t)
        root += group.eps
        rate = group.lr / (1 - beta1**t)
        if not group.use_kahan_summation:
            weight.addcdiv_(first, root, value=-rate)
            continue
        lost.addcdiv_(first, root, value=-rate)
        before = weight.clone()
        weight += lost
        lost += before - weight
    return weight, first, second, lost
