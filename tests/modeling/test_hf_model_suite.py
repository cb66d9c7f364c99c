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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    run = subprocess.run([*command, str(SUITE)], capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr

    # A test with subtests is reported once for each failing one: it passes if none of its entries failed.
    outcomes = {"StockTest": {}, "OursTest": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        passed = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        results = outcomes[case.get("classname").rsplit(".", 1)[1]]
        results[case.get("name")] = results.get(case.get("name"), True) and passed
    stock = {name for name, passed in outcomes["StockTest"].items() if passed}
    ours = {name for name, passed in outcomes["OursTest"].items() if passed}
    assert len(stock) > 90, "the suite did not run"
    assert not stock - ours, f"pass for GPT2LMHeadModel, not for GPTModel: {sorted(stock - ours)}\n{run.stdout[-3000:]}"
