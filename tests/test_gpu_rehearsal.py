"""A sample of the GPU's tests, run on the CPU so that they do not rot, and what happens without a GPU.

``LIGHTNING_OPTIM_GPU_TESTS_DEVICE=cpu pytest tests/gpu`` rehearses all of them; it takes minutes.
"""

from __future__ import annotations

import subprocess

import pytest
import torch

from tests.processes import run_fresh

VARIABLE = "LIGHTNING_OPTIM_GPU_TESTS_DEVICE"
SAMPLE = (
    "test_training.py::test_thirty_steps_lower_the_loss[adamw_torch_fused-16-mixed clip_norm]",
    "test_kernels.py::test_equal_to_the_cpu[adamw_bnb_8bit-torch.bfloat16]",
    "test_layerwise.py::test_bit_for_bit[sgd-16-mixed]",
    "test_resume.py::test_checkpoints_move_between_devices[sgd-to the GPU]",
    "test_fused.py::test_a_step_that_overflows_is_skipped[adamw_torch]",
)


def run(monkeypatch: pytest.MonkeyPatch, device: str, *tests: str) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv(VARIABLE, device)
    return run_fresh("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_a_sample_passes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, "cpu", *(f"tests/gpu/{test}" for test in SAMPLE))
    assert done.returncode == 0, done.stdout
    assert f"{len(SAMPLE)} passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_test_gpu_fails_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, "cuda", "tests/gpu")
    assert done.returncode != 0
    assert f"RuntimeError: {VARIABLE}=cuda and torch {torch.__version__} sees no CUDA GPU" in done.stdout
