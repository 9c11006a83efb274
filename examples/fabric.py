"""Trains the digits with Fabric: one's own loop, an optimizer and a schedule by name, stepped during backward.

Half of the training, a checkpoint, and the rest with new objects end at the weights of a whole training, bit for bit::

    python examples/fabric.py
    python examples/fabric.py --optim adopt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from digits import DigitClassifier, Digits
from lightning.fabric import Fabric, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_optim import Clipping, Layerwise, build_optimizer, build_schedule


class Training:
    """A network, its optimizer and its schedule, set up by Fabric.

    Args:
        fabric: Runs it.
        optim: Identifier.
        epochs: Of the whole training; the schedule ends with it.
    """

    def __init__(self, fabric: Fabric, optim: str, epochs: int) -> None:
        self.fabric, self.epochs, self.epoch = fabric, epochs, 0
        seed_everything(0, verbose=False)
        data = Digits()
        self.train, self.val = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())
        network = DigitClassifier().network
        optimizer = build_optimizer(network, f"{optim}_layerwise", lr=3e-3, weight_decay=0.1)
        steps = epochs * len(self.train)
        self.schedule = build_schedule(optimizer, "cosine", total_steps=steps, warmup_steps=steps // 10)
        self.layerwise = Layerwise.of(optimizer)
        self.network, self.optimizer = fabric.setup(network, optimizer)

    def run(self, until: int) -> None:
        """Trains to the end of an epoch."""
        while self.epoch < until:
            torch.manual_seed(self.epoch)  # the order of the batches
            for images, digits in self.train:
                loss = cross_entropy(self.network(images), digits)
                # Backward, clipping, step and zero_grad; each gradient is freed as soon as it was used.
                self.layerwise.backward(loss, clipping=Clipping("norm", 1.0), backward=self.fabric.backward)
                self.schedule.step()
            self.epoch += 1

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: getattr(self, name) for name in ("network", "optimizer", "schedule", "epoch")}

    def save(self, path: Path) -> None:
        """Writes what goes on."""
        self.fabric.save(path, self.state)

    def load(self, path: Path) -> None:
        """Goes on from what was written."""
        state = self.state
        self.fabric.load(path, state)  # objects load theirs; what is no object is put into the dict
        self.epoch = state["epoch"]

    @torch.no_grad()
    def accuracy(self) -> Tensor:
        """Returns the share of unseen digits that are recognized."""
        self.network.eval()
        ((images, digits),) = self.val
        right = (self.network(images).argmax(1) == digits).float().mean()
        self.network.train()
        return right


def main() -> None:
    """Trains with and without an interruption."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optim", default="stable_adamw", help="identifier (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="default: %(default)s")
    arguments = parser.parse_args()
    fabric = Fabric(accelerator="cpu")

    whole = Training(fabric, arguments.optim, arguments.epochs)
    print(f"Before: {whole.accuracy():.1%} right")
    whole.run(arguments.epochs)
    print(f"After: {whole.accuracy():.1%} right")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        half = Training(fabric, arguments.optim, arguments.epochs)
        half.run(arguments.epochs // 2)
        half.save(path)
        rest = Training(fabric, arguments.optim, arguments.epochs)
        rest.load(path)
    rest.run(arguments.epochs)
    pairs = zip(whole.network.parameters(), rest.network.parameters(), strict=True)
    equal = all(torch.equal(one, other) for one, other in pairs)
    print(f"Interrupted after {half.epoch} epochs: the weights are {'the same, bit for bit' if equal else 'others'}")


if __name__ == "__main__":
    main()
