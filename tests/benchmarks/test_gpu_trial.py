"""`python -m benchmarks.gpu_trial`: parts that fail or hang do not affect the others."""

import os
import signal
import subprocess
import sys

import psutil

from benchmarks.gpu_trial import RESULTS, Result, end_process_tree, read_results, run_part, table, write_result

STUBBORN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    print(subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True).pid, flush=True)
signal.pause()
"""


def test_a_process_is_ended_with_what_it_has_started():
    """Also one with its own session, as the workers of torchrun, that ignores SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, STUBBORN], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    end_process_tree(process)
    assert process.returncode == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_part_that_hangs_is_ended(tmp_path):
    os.mkfifo(tmp_path / RESULTS)  # where nobody reads: the first result is never written
    assert run_part("versions", tmp_path, seconds=8) == "ended after 8 s, which was its share of the time"


def test_a_part_that_fails_says_why(tmp_path):
    (tmp_path / "work").write_text("in the way")
    verdict = run_part("options", tmp_path, seconds=60)
    assert verdict.startswith("failed: ") and "Not a directory" in verdict
    assert read_results(tmp_path) == []


def test_results_are_a_table_with_the_verdicts_below(tmp_path):
    for one in (Result("loss", "chunks of 4", "2 ms"), Result("loss", "verdict", "works (1 s)")):
        write_result(tmp_path, one)
    assert table(read_results(tmp_path)) == (
        "| part | | |\n|---|---|---|\n| loss | chunks of 4 | 2 ms |\n\n- **loss** works (1 s)\n"
    )
