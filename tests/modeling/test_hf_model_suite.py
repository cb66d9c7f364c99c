"""`GPTModel` passes transformers' own model suite wherever stock GPT-2 does."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("hf_model_suite.py")


@pytest.mark.skipif(
    "TRANSFORMERS_SDIST" not in os.environ, reason="TRANSFORMERS_SDIST does not name transformers' unpacked sdist"
)
def test_passes_wherever_stock_gpt2_passes(tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run([*command, str(SUITE)], capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr

    # A test with subtests is reported once for each failing one: it passes if none of its entries failed.
    failed, passed = ({"StockTest": set(), "OursTest": set()} for _ in range(2))
    for case in ElementTree.parse(report).iter("testcase"):
        kind = case.get("classname").rsplit(".", 1)[1]
        if case.find("failure") is not None or case.find("error") is not None:
            failed[kind].add(case.get("name"))
        elif case.find("skipped") is None:
            passed[kind].add(case.get("name"))
    stock, ours = (passed[kind] - failed[kind] for kind in ("StockTest", "OursTest"))
    assert len(stock) > 90, "the suite did not run"
    assert not stock - ours, f"pass for GPT2LMHeadModel, not for GPTModel: {sorted(stock - ours)}\n{run.stdout[-3000:]}"
    assert not failed["OursTest"] - failed["StockTest"], run.stdout[-3000:]
