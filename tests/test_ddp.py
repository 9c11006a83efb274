"""Two real processes with gloo: ranks stay identical, checkpoints resume exactly, averages are saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RUN = """
import sys, torch
from pathlib import Path
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.models import LitTokens, loader, trainer

class SameOnEveryRank(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        for parameter in pl_module.parameters():
            mine = parameter.detach().flatten()
            everyone = pl_module.all_gather(mine)
            assert torch.equal(everyone[0], everyone[1])

def fit(name, directory, ckpt_path=None):
    torch.manual_seed(0)
    model = LitTokens(optim=name, lr=1e-2, weight_decay=0.1)
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    run = trainer(max_steps=10, strategy="ddp_spawn", devices=2, callbacks=[SameOnEveryRank(), saver],
                  enable_checkpointing=True, val_check_interval=1.0)
    run.fit(model, loader(10), loader(2, seed=1), ckpt_path=ckpt_path)
    return torch.load(directory / "step=10.ckpt", weights_only=True)

if __name__ == "__main__":
    name, directory = sys.argv[1], Path(sys.argv[2])
    whole = fit(name, directory / "whole")
    resumed = fit(name, directory / "resumed", directory / "whole" / "step=5.ckpt")
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    assert whole["optimizer_states"][0].keys() == resumed["optimizer_states"][0].keys()
    print("RESUMED EXACTLY")
"""


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free_adamw"])
def test_two_ranks_stay_identical_and_resume_exactly(name: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script), name, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RESUMED EXACTLY" in done.stdout
