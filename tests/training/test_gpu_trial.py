"""The trial of a machine, on this one: parts that fail or hang cost only themselves."""

import os

from training.gpu_trial import RESULTS, Result, read_results, run_part, table, write_result


def test_a_part_that_hangs_is_ended_with_what_it_has_started(tmp_path):
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
