"""How OpenMP's threads wait in the processes of the commands, as libgomp itself says (OMP_DISPLAY_ENV)."""

import os
import re
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT
from test_commands import MODULES

from benchmarks.busy_machine import company
from data_prep.common.openmp import spin_limit

# The first three start processes that compute, each with its trainer's own setting; the last is not this trainer.
HAVE_OTHERS = {f"benchmarks.{name}" for name in ("busy_machine", "time_to_loss", "training_step", "other_trainers")}
LOAD_TORCH = [
    "training.train",
    *(m for m in MODULES if m.startswith(("eval.", "benchmarks.")) and m not in HAVE_OTHERS),
]
LAUNCHED = ["accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "training/train.py"]


def spin_counts(*words: str, **settings: str) -> list[str]:
    """GOMP_SPINCOUNT in each process of a command that loads libgomp, with only these settings of OpenMP."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = others | {"OMP_DISPLAY_ENV": "VERBOSE"} | settings
    done = subprocess.run(
        [sys.executable, "-m", *words, "--help"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
)
def test_threads_of_a_launched_run_beside_others_sleep_soon_unless_the_user_says_otherwise(settings, expected):
    """The last process to load it is the one that trains. The others are real, one a core."""
    with company(0 if settings else os.cpu_count()):
        assert spin_counts(*LAUNCHED, **settings)[-1] == expected


@pytest.mark.parametrize(
    ("busy", "threads", "expected"),
    [(0, "", "10000"), (0.4, "", "10000"), (1, "", "1000"), (1, "1", "10000"), (1, "2,1", "1000"), (1, "99", "1000")],
)
def test_threads_spin_longer_where_every_one_has_a_core(monkeypatch, busy, threads, expected):
    """By the loads that psutil reports: `busy` of two cores are taken."""
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100 * busy, 0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert spin_limit() == {"GOMP_SPINCOUNT": expected}


def test_where_loads_cannot_be_seen_threads_sleep_soon(monkeypatch):
    """A container that lists one core, where the process has the cores 2 and 5; then one that lets nobody look."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5}, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [0.0])
    assert spin_limit() == {"GOMP_SPINCOUNT": "1000"}

    def refuse(interval, percpu):
        raise PermissionError(13, "Permission denied", "/proc/stat")

    monkeypatch.setattr(psutil, "cpu_percent", refuse)
    assert spin_limit() == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.processes
@pytest.mark.parametrize("module", LOAD_TORCH)
def test_threads_of_every_command_that_computes_sleep_soon(module):
    assert set(spin_counts(module)) <= {"1000", "10000"}
