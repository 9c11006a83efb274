"""A GAN draws digits: two networks, two optimizers, each by its name.

The generator's is schedule-free: its averaged weights draw, as GANs do with a moving average of them. The
discriminator's keeps its state in 8 bits. Any two that take betas will do::

    python examples/gan.py
    python examples/gan.py --generator adamw_torch --discriminator adopt

It prints the Fréchet distance between the pixels of drawn and of real digits, before and after; smaller is better.
``gan.png`` shows all three.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from torch.utils.data import DataLoader

from lightning_optim import OptimMixin

NOISE, WIDTH, PIXELS = 16, 128, 8 * 8


class GAN(OptimMixin, LightningModule):
    """Two perceptrons that learn from each other.

    Args:
        discriminator: Arguments of the discriminator's optimizer.
        **optim: ``optim``, ``lr``, ``optim_args`` ... of the generator's: see :class:`lightning_optim.OptimMixin`.
    """

    def __init__(self, discriminator: dict[str, Any], **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()),
            *(nn.Linear(WIDTH, PIXELS), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Linear(PIXELS, WIDTH), nn.LeakyReLU(0.2)),
            *(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)),
            nn.Linear(WIDTH, 1),
        )

    def configure_optimizers(self) -> Any:
        generator = self.build_optimizer(self.generator)  # by the module's own arguments
        discriminator = self.build_optimizer(self.discriminator, **self.hparams["discriminator"])
        return [generator, discriminator]

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        drawn, real = self.draw(len(real)), real.requires_grad_()

        # Real digits shall score higher than drawn ones, on a gentle slope.
        discriminator.zero_grad()
        scores = self.discriminator(real)
        (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        loss = softplus(self.discriminator(drawn.detach()) - scores).mean() + 0.3 * slope.square().sum(1).mean()
        self.manual_backward(loss)
        discriminator.step()

        # And drawn ones higher than real ones.
        generator.zero_grad()
        self.manual_backward(softplus(self.discriminator(real.detach()) - self.discriminator(drawn)).mean())
        generator.step()

    def draw(self, count: int) -> Tensor:
        """Draws digits."""
        return self.generator(torch.randn(count, NOISE, device=self.device))


def distance(drawn: Tensor, real: Tensor) -> float:
    """Returns the Fréchet distance between two sets of images, each taken for a normal distribution of its pixels."""
    means = (drawn.mean(0) - real.mean(0)).square().sum()
    one, other = drawn.T.cov(), real.T.cov()
    shared = torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    return float(means + one.trace() + other.trace() - 2 * shared)


def save(pictures: dict[str, Tensor], path: Path) -> None:
    """Saves eight times eight images of each."""
    figure = Figure(figsize=(3 * len(pictures), 3.3), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        tiles = pad(images[:64].view(8, 8, 8, 8), (1, 1, 1, 1))  # rows, columns, heights, widths
        axes.imshow(tiles.transpose(1, 2).reshape(80, 80), cmap="gray_r")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains both networks, and compares what is drawn before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", default="schedule_free_adamw", help="identifier (default: %(default)s)")
    parser.add_argument("--discriminator", default="adamw_8bit", help="identifier (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    torch.set_num_threads(1)  # several wait for each other over matrices this small
    real = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = GAN(
        optim=arguments.generator,
        lr=3e-3,
        optim_args={"betas": (0.5, 0.99)},
        discriminator={"optim": arguments.discriminator, "lr": 1e-3, "optim_args": {"betas": (0.5, 0.99)}},
    )
    before = model.draw(len(real)).detach()
    trainer = Trainer(max_epochs=arguments.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(real, batch_size=64, shuffle=True))
    after = model.draw(len(real)).detach()
    print(f"Distance from real digits: {distance(before, real):.2f} before, {distance(after, real):.2f} after")

    arguments.output.mkdir(parents=True, exist_ok=True)
    save({"before": before, "after": after, "real": real}, arguments.output / "gan.png")
    print(f"The pictures are in {arguments.output / 'gan.png'}")


if __name__ == "__main__":
    main()
