"""The modules that cells train: with and without OptimMixin, and as odd as modules in the field are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_optim import OptimMixin
from tests.models import LENGTH, TOKENS, loader
from tests.stress.axes import Cell

# A matrix of this width has 4096 elements, enough to be quantized.
WIDTH = 64
BATCHES, BATCH_SIZE = 5, 8


class Conv(nn.Module):
    """A convolution over the sequence, folded into a square, with a weight in another layout."""

    def __init__(self) -> None:
        super().__init__()
        # 32 * 32 * 9 elements: more than are quantized.
        self.inner = nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, hidden: Tensor) -> Tensor:
        # 8 tokens of 64 numbers: 32 channels of 4 by 4
        images = hidden.reshape(hidden.shape[0], LENGTH // 2, LENGTH // 2, WIDTH // 2).permute(0, 3, 1, 2)
        return self.inner(images).permute(0, 2, 3, 1).reshape(hidden.shape)


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale


class Rotated(nn.Module):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.polar(torch.ones(WIDTH), torch.rand(WIDTH)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.view_as_real(hidden.float() * self.phase)[..., 0].to(hidden.dtype)


class Other(nn.Module):
    """A layer in float64 within a model of any other type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(hidden.to(self.inner.weight.dtype)).to(hidden.dtype)


class Unused(nn.Module):
    """A layer that forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Foreign(nn.Module):
    """Names that are no English."""

    def __init__(self) -> None:
        super().__init__()
        self.größe = nn.Linear(WIDTH, WIDTH)
        self.more = nn.ModuleDict({"層 一": nn.Linear(WIDTH, WIDTH), "a/b:c@d": nn.Linear(WIDTH, WIDTH)})

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (self.größe, *self.more.values()):
            hidden = layer(hidden).tanh()
        return hidden


class Normed(nn.Module):
    """Statistics of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.transpose(1, 2)).transpose(1, 2)


class Experts(nn.Module):
    """Parameters of three dimensions, as transformers stores experts."""

    def __init__(self) -> None:
        super().__init__()
        # Small: SOAP takes the last two dimensions for one side, and has a square of it.
        self.inner = nn.Parameter(torch.randn(8, WIDTH, WIDTH // 8) / 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("blw,ewv->blev", hidden, self.inner).flatten(2)


ODD: dict[str, Callable[[], nn.Module]] = {
    "channels_last": Conv,
    "0-dim": Scaled,
    "complex": Rotated,
    "two dtypes": Other,
    "unused": Unused,
    "unicode": Foreign,
    "BatchNorm": Normed,
    "experts": Experts,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.gelu(self.linear(self.norm(hidden)))


class Backbone(nn.Module):
    """An embedding and blocks, the odd one among them."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, sparse=cell["module"] == "sparse")
        odd = ODD.get(cell["module"], Block)()
        self.blocks = nn.ModuleList([Block(), odd, Block()])
        if cell["module"] == "frozen":
            self.blocks[0].requires_grad_(False)
        self.recomputes = cell["checkpointing"]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.recomputes == "no" or not self.training:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.recomputes == "reentrant")
        return hidden


class Net(nn.Module):
    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.backbone = Backbone(cell)
        self.head = nn.Linear(WIDTH, TOKENS)
        if cell["module"] == "tied":
            nn.init.normal_(self.backbone.embedding.weight, std=0.1)
            self.head.weight = self.backbone.embedding.weight
            # Each of them in an activation checkpoint of its own.
            self.backbone.blocks[2].linear.weight = self.backbone.blocks[0].linear.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone(tokens))


class Resumable(DataLoader[Any]):
    """Goes on where it was, as torchdata's does: Lightning would begin the epoch's data anew."""

    _done = 0
    _skipped = 0

    def __iter__(self) -> Any:
        skipped, self._skipped = self._skipped, 0
        self._done = skipped
        for batch in itertools.islice(super().__iter__(), skipped, None):
            self._done += 1
            yield batch
        self._done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # At the end of an epoch there is nothing to skip in the next.
        self._skipped = state["done"] % len(self)


class Trains(L.LightningModule):
    """All that both kinds of module have; learns to predict ``(3 * token + 1) % TOKENS``."""

    def _make(self, cell: Cell, compiled: bool) -> None:
        self.cell = cell
        self.batch_size = BATCH_SIZE
        self.net = Net(cell)
        if not compiled:
            return
        if cell["compile"] == "blocks":
            for block in self.net.backbone.blocks:
                block.compile(backend="aot_eager")
        elif cell["compile"] == "whole":
            self.net.compile(backend="aot_eager")

    @property
    def backbone(self) -> nn.Module:
        """What BackboneFinetuning freezes."""
        return self.net.backbone

    def configure_model(self) -> None:
        if self.cell["strategy"] != "layerwise_fsdp2":
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        blocks = list(self.net.backbone.blocks)
        # What shares a parameter has to be one group.
        groups = [[blocks[0], blocks[2]], [blocks[1]]] if self.cell["module"] == "tied" else [[one] for one in blocks]
        for group in groups:
            if any(True for block in group for _ in block.parameters()):
                fully_shard(group, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def _loss(self, batch: Sequence[Tensor]) -> Tensor:
        tokens, targets = batch
        logits = self.net(tokens).flatten(0, 1)
        return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), targets.flatten())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=self.cell.distributed)

    def train_dataloader(self) -> DataLoader[Any]:
        ranks = 2 if self.cell.distributed else 1
        # One that goes on does not know of the limit of overfit_batches, and would begin the next epoch there.
        kind = DataLoader if self.cell["flag"] == "overfit_batches" else Resumable
        return kind(loader(BATCHES * ranks, BATCH_SIZE).dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(loader(2, BATCH_SIZE, seed=1).dataset, batch_size=BATCH_SIZE)


class Named(OptimMixin, Trains):
    """Its optimizer has a name."""

    def __init__(self, cell: Cell, compiled: bool = True, **optim: Any) -> None:
        super().__init__(**optim)
        self._make(cell, compiled)


class Upstream(Trains):
    """Its optimizer is the upstream class: nothing of lightning_optim."""

    def __init__(self, cell: Cell, compiled: bool, configure: Callable[[Upstream], Any]) -> None:
        super().__init__()
        self._make(cell, compiled)
        self._configure = configure
        # What LearningRateFinder looks for, and sets.
        self.lr = cell.case.lr

    def configure_optimizers(self) -> Any:
        return self._configure(self)
