"""Fine-tunes a tiny Hugging Face model with LoRA and 8-bit AdamW, and saves no more than the adapter.

The model is made from a config, and first learns the Python documentation with all its weights. Then adapters alone
learn Python code; the report at the start of each fit says what is stepped. Text is bytes, and ships with CPython::

    python examples/lora.py

It prints the loss on code before and after, and that of the base with the adapter that was saved.
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
import typing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_optim import OptimMixin

CONFIG = LlamaConfig(
    vocab_size=256,  # a token is a byte
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
# With rank 16, the matrices of the adapters are just large enough for a state of 8 bits: 4096 elements.
ADAPTER = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


class LanguageModel(OptimMixin, LightningModule):
    """Any model of transformers that computes its loss. What is frozen in it needs no optimizer, and gets none."""

    def __init__(self, network: nn.Module, **optim: Any) -> None:
        super().__init__(**optim)
        self.network = network

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.network(tokens, labels=tokens).loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.network(tokens, labels=tokens).loss)


def windows(text: str) -> Tensor:
    """Returns a text as rows of 128 bytes."""
    return torch.tensor(list(text.encode())).unfold(0, 128, 128)


def loss(network: nn.Module, data: Tensor) -> float:
    """Returns the mean loss per byte."""
    (metrics,) = Trainer(accelerator="cpu", logger=False).validate(
        LanguageModel(network), DataLoader(data, batch_size=32), verbose=False
    )
    return metrics["val_loss"]


def train(network: nn.Module, data: Tensor, steps: int, lr: float) -> None:
    """Trains whatever is not frozen."""
    model = LanguageModel(network, optim="adamw_8bit", lr=lr, lr_scheduler="cosine", warmup_steps=0.1)
    trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True))


def size(folder: Path) -> str:
    """Returns how large the weights in a folder are."""
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 2**20:.2f} MiB"


def main() -> None:
    """Trains a base, fine-tunes it, and loads what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    base, adapter = arguments.output / "lora_base", arguments.output / "lora_adapter"

    seed_everything(0)
    documentation = windows("".join(topics[name] for name in sorted(topics)))
    code = windows("".join(inspect.getsource(module) for module in (argparse, inspect, tarfile, typing)))
    code, unseen = code[::2], code[1::2][:64]

    network = LlamaForCausalLM(CONFIG)
    train(network, documentation, arguments.steps, lr=3e-3)
    network.save_pretrained(base)
    before = loss(network, unseen)

    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), ADAPTER)
    train(tuned, code, arguments.steps, lr=3e-3)
    tuned.save_pretrained(adapter)
    after = loss(tuned, unseen)

    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    print(f"Loss on code: {before:.4f} before, {after:.4f} after, {loss(loaded, unseen):.4f} loaded")
    print(f"{base}: {size(base)}. {adapter}: {size(adapter)}.")


if __name__ == "__main__":
    main()
