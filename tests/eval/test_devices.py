"""Threads of a process, from the environment of its launch."""

import os

import pytest

from data_prep.common.command_line import UserError
from eval.common.devices import num_threads


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_user_decides(text, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert num_threads() == threads


def test_one_thread_is_the_launchers_default_and_becomes_a_share_of_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert num_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert num_threads() == 1


@pytest.mark.parametrize("text", ["", "many", "0", "-2", "1.5", ",2"])
def test_what_is_no_number_is_refused(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match=f"^OMP_NUM_THREADS={text!r} is not a number of threads from 1; set one"):
        num_threads()
