"""A small training: a module, its optimizer, and gradients that are the same every time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.layerwise import Layerwise
from lightning_optim.stepping import averaging_parts, seed

_TOKENS, _WIDTH = 16, 64


class Tokens(nn.Module):
    """Learns ``(3 * token + 1) % 16``: embedding, matrix, norm and head, the matrix large enough to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TOKENS, _WIDTH)
        self.linear = nn.Linear(_WIDTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        logits: Tensor = self.head(self.norm(hidden + nn.functional.gelu(self.linear(hidden))))
        return logits


class Shapes(nn.Module):
    """A matrix to be stepped beside parameters of no dimension, of no element and of up to five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scalar = nn.Parameter(torch.randn(()))
        self.single = nn.Parameter(torch.randn(1))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.stack = nn.Parameter(torch.randn(4, 3, 3))
        self.kernels = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.five = nn.Parameter(torch.randn(2, 3, 2, 2, 2))


class Trial:
    """One training. Two of the same module and optimizer are equal after the same steps.

    Args:
        module: Its parameters are trained.
        optimizer: Steps them, plainly or during backward.
        closes: Whether its step is given the closure, which it calls.
        makes_graphs: Whether its step differentiates the gradients.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, closes: bool = False, makes_graphs: bool = False
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.closes = closes
        self.makes_graphs = makes_graphs
        #: By what share of itself an element of a gradient is changed, at most: each by another, as by rounding.
        self.nudge = 0.0
        self.parameters = dict(module.named_parameters())
        for part in averaging_parts(optimizer):
            part.train()

    def weights(self) -> dict[str, Tensor]:
        """Returns a copy of the parameters as they are trained."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def outcome(self) -> dict[str, Any]:
        """Returns all that a training leaves behind."""
        return {"weights": self.weights(), "state_dict": self.optimizer.state_dict()}

    def loss(self) -> Tensor:
        """Returns the loss of the task, for :class:`Tokens`."""
        device = next(iter(self.parameters.values())).device
        tokens = torch.arange(_TOKENS, device=device)
        return nn.functional.cross_entropy(self.module(tokens).float(), (3 * tokens + 1) % _TOKENS)

    def evaluate(self) -> float:
        """Returns the loss with the weights that are to be used after training."""
        parts = averaging_parts(self.optimizer)
        for part in parts:
            part.eval()
        with torch.no_grad():
            loss = float(self.loss())
        for part in parts:
            part.train()
        return loss

    def learn(self, steps: int, schedule: LRScheduler | None = None) -> None:
        """Takes steps on the task."""
        for step in range(steps):
            self._step(self.loss, step)
            if schedule is not None:
                schedule.step()

    def advance(
        self,
        steps: Iterable[int],
        missing: Callable[[int, int], bool] = lambda index, step: False,
        *,
        micro_batches: int = 1,
        scaler: GradScaler | None = None,
        scale: float = 1.0,
        schedule: LRScheduler | None = None,
    ) -> None:
        """Takes steps with given gradients, which depend on the number of the step only.

        Args:
            steps: The numbers.
            missing: Says by its position and the step which parameter gets no gradient.
            micro_batches: How many equal shares a gradient arrives in; a power of two, so that their sum is exact.
            scaler: Scales the losses, and unscales the gradients.
            scale: A factor of the gradients.
            schedule: Is stepped after each step.
        """
        for step in steps:
            for _ in range(micro_batches - 1):
                self.backward(self.pull(step, missing, scale / micro_batches))
            self._step(lambda step=step: self.pull(step, missing, scale / micro_batches), step, scaler)  # type: ignore[misc]
            if schedule is not None:
                schedule.step()

    def pull(
        self, step: int, missing: Callable[[int, int], bool] = lambda index, step: False, scale: float = 1.0
    ) -> Tensor:
        """Returns a loss whose gradients are given numbers."""
        generator = torch.Generator().manual_seed(1000 + step)
        loss = torch.zeros(())
        for index, parameter in enumerate(self.parameters.values()):
            gradient = torch.randn(parameter.shape, generator=generator, device="cpu") * scale
            if self.nudge:
                shares = torch.linspace(-self.nudge, self.nudge, gradient.numel())
                gradient = gradient * (1 + shares.view(gradient.shape))
            if not missing(index, step):
                loss = loss.to(parameter.device) + (parameter * gradient.to(parameter)).sum()
            if not missing(index, step) and self.makes_graphs:
                # Adds 0 to the gradient, and the identity to what it is differentiated to.
                loss = loss + (parameter - parameter.detach()).square().sum() * (scale / 2)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients, as the optimizer needs them."""
        loss.backward(create_graph=self.makes_graphs)  # type: ignore[no-untyped-call]

    def _step(self, make: Callable[[], Tensor], number: int, scaler: GradScaler | None = None) -> None:
        seed(number, self.optimizer)
        if self.closes:
            self.optimizer.step(lambda: self._compute(make))  # type: ignore[arg-type,return-value]
            self.optimizer.zero_grad()
            return
        layerwise = Layerwise.of(self.optimizer)
        loss = make()
        if layerwise is not None and loss.requires_grad:
            layerwise.backward(loss, scaler=scaler)
        else:
            if loss.requires_grad:
                self.backward(scaler.scale(loss) if scaler else loss)
            if scaler:
                scaler.step(self.optimizer)
            else:
                self.optimizer.step()
        if scaler:
            scaler.update()
        self.optimizer.zero_grad()

    def _compute(self, make: Callable[[], Tensor]) -> Tensor:
        """What a closure does; as Lightning's, it enables gradients itself."""
        with torch.enable_grad():
            self.optimizer.zero_grad()
            loss = make()
            if loss.requires_grad:
                self.backward(loss)
        return loss
