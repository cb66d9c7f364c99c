"""What a run says of itself: its progress, its GPU, its optimizer and its revision."""

import subprocess

import pytest
import torch

from training.engine.optimizer import describe, make_optimizer
from training.monitoring.log import git_revision, progress
from training.monitoring.metrics import peak_flops, read_gpu
from training.settings.schema import OptimizerSettings

STEP = {"loss": 4.56789, "learning_rate": 3e-3, "grad_norm": 0.987, "batch_tokens": 2048, "tokens_per_second": 8192.0}


def test_the_progress_line_says_what_one_watches():
    assert progress(STEP) == "loss 4.5679, lr 3.00e-03, norm 0.99, 250 ms, 8,192 tokens/s"
    on_gpu = STEP | {"memory_bytes": 3 << 29, "gpu_utilization": 97.0, "gpu_temperature": 64.0, "gpu_power": 412.4}
    assert progress(on_gpu).endswith("8,192 tokens/s, GPU 97%, 1.5 GiB, 64 °C, 412 W")


def test_a_gpu_that_does_not_tell_everything(monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(torch.cuda, "temperature", missing)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 412_400)  # milliwatts
    assert read_gpu(torch.device("cuda", 0)) == {"gpu_utilization": 97.0, "gpu_power": pytest.approx(412.4)}
    assert read_gpu(torch.device("cpu")) == {}


def test_the_optimizer_is_described():
    """Of a norm and two matrices, with biases: decayed are the matrices."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    text = describe(make_optimizer(model, OptimizerSettings(optim="adamw", learning_rate=3e-3)))
    assert text == "fused AdamW at 0.003; 2 tensors with 40 parameters decayed, 3 tensors with 12 parameters not"


def test_an_unknown_peak_is_none():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12 and peak_flops("NVIDIA L4", "bf16") == 121e12
    for unlisted in ("NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA GB200"):
        assert peak_flops(unlisted, "bf16") is None
    assert peak_flops("2 CPU threads", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") is None


def test_the_revision_of_the_repository_that_tracks_the_file(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    installed = tmp_path / "installed.py"
    installed.touch()
    assert git_revision(installed) is None  # in no repository
    git("init")
    tracked = tmp_path / "tracked.py"
    tracked.touch()
    git("add", "tracked.py")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_revision(tracked) == commit
    assert git_revision(installed) is None  # in an environment within somebody's repository
    tracked.write_text("changed")
    assert git_revision(tracked) == f"{commit}+"
