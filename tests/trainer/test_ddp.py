"""Two real processes with gloo: ranks stay identical, checkpoints resume exactly, averages are saved."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_fresh

_RUN = """
import sys, torch
from pathlib import Path

from tests.processes import run_fresh
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.processes import run_fresh
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
    run = trainer(max_steps=10, strategy="ddp_fork", devices=2, callbacks=[SameOnEveryRank(), saver],
                  enable_checkpointing=True, val_check_interval=1.0)
    run.fit(model, loader(10), loader(2, seed=1), ckpt_path=ckpt_path)
    return torch.load(directory / "step=10.ckpt", weights_only=True)

if __name__ == "__main__":
    for name in ("adamw_8bit", "schedule_free_adamw"):
        directory = Path(sys.argv[1]) / name
        whole = fit(name, directory / "whole")
        resumed = fit(name, directory / "resumed", directory / "whole" / "step=5.ckpt")
        for key, value in whole["state_dict"].items():
            assert torch.equal(value, resumed["state_dict"][key]), key
        assert whole["optimizer_states"][0].keys() == resumed["optimizer_states"][0].keys()
        print(name, "RESUMED EXACTLY")
"""


def test_two_ranks_stay_identical_and_resume_exactly(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    done = run_fresh(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RESUMED EXACTLY") == 2
