"""Model cards: read back by the Hub's own parser."""

import json
import math
import re
import shlex

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from data_prep.prepare import main as prepare_main
from data_prep.prepare import preparing_command
from data_prep.sharding.manifest import Manifest
from eval.reporting.card import model_card
from eval.reporting.records import read_run

STEP = 10


@pytest.fixture(scope="module")
def card(train, swag_file, tmp_path_factory) -> tuple[ModelCard, dict, str]:
    """The card of the checkpoint of step 10 of 20, and the metrics of its run."""
    words = "--max_steps 20 --save_steps 10 --eval_steps 5 --sample_every 10 --sample_tokens 4 --hellaswag_every 10"
    flags = [*words.split(), "--hellaswag_data", swag_file, "--hellaswag_limit", "4"]
    run = train("carded", *flags)
    scores = {"wikitext": {"alias": "wikitext", "word_perplexity,none": 33.25, "word_perplexity_stderr,none": "N/A"}}
    for step in (STEP, 20):
        results = {"results": scores} if step == STEP else {"results": {"wikitext": {"word_perplexity,none": 99.0}}}
        results["n-samples"] = {"wikitext": {"original": 62, "effective": 7}}
        (run.folder / "checkpoints" / f"step_{step:08d}.lm_eval.json").write_text(json.dumps(results))
    record = read_run(run.folder)
    text = model_card(record, STEP, run.checkpoints[0], "user/carded", "mit", [run.folder / "report" / "loss.png"])
    file = tmp_path_factory.mktemp("card") / "README.md"
    file.write_text(text)
    return ModelCard.load(file), run.metrics(), text


def test_its_metadata_is_the_hub_s(card):
    """Each score of this step, and of no other, by the Hub's parser; and there and back through its model-index."""
    data, metrics, _ = card[0].data, card[1], card[2]
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    found = {(one.dataset_type.rpartition("/")[2], one.metric_name): one.metric_value for one in data.eval_results}
    at = metrics[STEP]
    text = next(dataset for dataset, metric in found if metric == "Bits per byte")
    assert found == pytest.approx({
        (text, "Validation loss, nats per token"): at["val_loss"],
        (text, "Perplexity per token"): math.exp(at["val_loss"]),
        (text, "Bits per byte"): at["val_bits_per_byte"],
        ("hellaswag", "acc_norm by the completion rule"): at["hellaswag/completion/acc_norm"],
        ("hellaswag", "acc by the completion rule"): at["hellaswag/completion/acc"],
        ("wikitext", "word_perplexity by lm-evaluation-harness"): 33.25,
    }, abs=1e-5)  # fmt: skip
    assert all(isinstance(one, EvalResult) for one in data.eval_results)
    name, again = model_index_to_eval_results(eval_results_to_model_index(data.model_name, data.eval_results))
    assert name == "carded" and again == data.eval_results
    assert {one.dataset_args["limit"] for one in again if "acc" in one.metric_type} == {4}
    assert [one.dataset_args["limit"] for one in again if one.dataset_type == "wikitext"] == [7]


def test_it_is_complete(card, data_folder):
    metrics, text = card[1], card[2]
    for line in (
        "A GPT-2 with 45,728 parameters, pre-trained from random weights on 5,120 tokens",
        f"| FLOPs | {5120 * 6 * (45728 - 32 * 32 - 2 * (13 * 32) - 2 * 32) + 5120 * 12 * 2 * 32 * 32:.3g}, of ",
        "| layers | 2 |",
        "| hardware | 1 x ",
        "| `learning_rate` | 0.01 |",
        "![Training and validation loss](loss.png)",
        "has not been searched for evaluation sets",
        "- Cleaning of `",
        "hf download user/carded training_config.yaml --local-dir .",
        "## Limits",
        "## Licence\n\n`mit`",
    ):
        assert line in text, line
    assert not re.search(r"\b(None|nan)\b", text)
    assert f"{metrics[20]['val_loss']:.4f}" not in text


def test_its_command_makes_the_same_data(card, data_folder, tmp_path, monkeypatch):
    """The one that the card has, run for another folder."""
    text = card[2]
    line = next(line for line in text.splitlines() if line.startswith("python -m data_prep.prepare"))
    words = shlex.split(line)[2:]
    manifest = Manifest.read(data_folder)
    assert words == preparing_command(str(data_folder), manifest)
    monkeypatch.setattr("sys.argv", [words[0], str(tmp_path / "again"), *words[2:]])
    prepare_main()
    again = Manifest.read(tmp_path / "again")
    assert (again.shards_sha256, again.tokenizer) == (manifest.shards_sha256, manifest.tokenizer)
