"""A base model trained on conversations by TRL, against stock GPT-2 on one conversation at a time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from chats import TALK, base_model
from conftest import run_command
from datasets import Dataset
from safetensors.torch import load_file
from standin_hub import serve_dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.sources.builtin import docstring_conversations
from modeling.import_checkpoint import write_folder
from training.finetuning import FinetuningSettings, add_chat_template, finetune, render

pytestmark = pytest.mark.clients
pytest.importorskip("trl")
FEW = FinetuningSettings(learning_rate=5e-3, max_steps=12, per_device_train_batch_size=64, mixed_precision="no")


@pytest.fixture(scope="module")
def talks() -> list:
    return [talk for talk in docstring_conversations() if len(str(talk)) < 400][:24]


def loss_of(model, tokenizer, talks) -> float:
    """Nats per token of the assistant; each conversation by itself."""
    total, count = 0.0, 0
    for talk in talks:
        ids, learned = (torch.tensor(column) for column in zip(*render(tokenizer, talk), strict=True))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[1:], reduction="none")[learned[1:]].sum())
        count += int(learned[1:].sum())
    return total / count


def test_the_loss_is_that_of_stock_and_falls(talks, data_folder, tmp_path):
    """The held-out conversations are one packed batch: none of them sees another."""
    model, tokenizer = base_model(data_folder, n_positions=256)
    add_chat_template(model, tokenizer)
    expected = loss_of(model, tokenizer, talks[:6])
    parts = {"train": talks[6:], "test": talks[:6]}
    data = {name: Dataset.from_list([{"messages": talk} for talk in part]) for name, part in parts.items()}
    losses = finetune(model, tokenizer, data, FEW, tmp_path / "states")
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert list(losses) == list(range(FEW.max_steps + 1))
    last = losses[FEW.max_steps]
    assert last < losses[0] - 0.1
    write_folder(model, tokenizer, tmp_path / "chat")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "chat").eval()
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert loss_of(stock, tokenizer, talks[:6]) == pytest.approx(last, rel=1e-4)


@pytest.mark.slow
def test_a_killed_training_is_continued_by_the_same_command(data_folder, tmp_path):
    model, tokenizer = base_model(data_folder, n_positions=128)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "training.chat", "base", "--data", "builtin", "--max_train_samples", "100"]
    command += ["--max_eval_samples", "20", "--max_steps", "30", "--mixed_precision", "no", "--output_dir"]
    with subprocess.Popen([*command, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL) as killed:
        while not list(tmp_path.glob(".killed.training/state/checkpoint-*/trainer_state.json")):
            assert killed.poll() is None
        killed.kill()
    other = run_command(*command, "killed", "--seed", "5", cwd=tmp_path, exit_code=2)
    assert ".killed.training has an unfinished training with other settings; remove it" in other.stderr
    continued, whole = (run_command(*command, name, cwd=tmp_path).stdout for name in ("killed", "whole"))
    assert "'epoch': 0}" in whole and "'epoch': 0}" not in continued
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=0)
    assert not list(tmp_path.glob(".*"))


def test_trl_trains_the_result_further_with_no_flag(talks, data_folder, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = base_model(data_folder, n_positions=256)
    add_chat_template(model, tokenizer)
    write_folder(model, tokenizer, tmp_path / "chat")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    config = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_steps=2, **options)
    data = Dataset.from_list([{"messages": talk} for talk in talks])
    trainer = SFTTrainer(model=str(tmp_path / "chat"), args=config, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 1


def test_the_command_with_a_data_set_of_the_hub(data_folder, tmp_path):
    """Conversations of the (stand-in) Hub in, a chat model out, which answers; the folder is not written twice."""
    from io import BytesIO

    import pyarrow
    from pyarrow import parquet

    model, tokenizer = base_model(data_folder, n_positions=48)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": TALK[1:], "source": "x"}] * 12), file)
    command = [sys.executable, "-m", "training.chat", "base", "--data", "user/talks", "--max_eval_samples", "2"]
    command += ["--max_train_samples", "8", "--max_steps", "2", "--output_dir", "out/talker"]
    with serve_dataset("user/talks", {"data/train-00000-of-00001.parquet": file.getvalue()}) as (endpoint, _):
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        environment = os.environ | hub | {"HF_HUB_DISABLE_XET": "1"}
        done = run_command(*command, cwd=tmp_path, env=environment)
        again = run_command(*command, cwd=tmp_path, env=environment, exit_code=2)
    assert "10 conversations are longer than 48 tokens and cut there" in done.stdout
    assert "8 conversations to learn from, 2 held out" in done.stdout and "[<|im_end|>]" in done.stdout
    assert "held-out loss" in done.stdout and "transformers chat out/talker" in done.stdout
    assert again.stderr == "error: output_dir=out/talker exists; give another, or remove it\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["talker"]
    written = json.loads((tmp_path / "out/talker/config.json").read_text())
    assert written["architectures"] == ["GPT2LMHeadModel"] and written["vocab_size"] == len(tokenizer) + 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out/talker").chat_template


@pytest.mark.parametrize("output", ["file/chat", "/proc/chat"])
def test_an_output_that_cannot_be_written_is_told_before_anything_is_loaded(output, tmp_path):
    (tmp_path / "file").write_text("precious")
    command = [sys.executable, "-m", "training.chat", "no_model", "--output_dir", output]
    done = run_command(*command, cwd=tmp_path, exit_code=2)
    assert done.stderr.startswith(f"error: output_dir={output} cannot be written (")
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_settings_out_of_bounds_are_told_together(tmp_path):
    bad = "--learning_rate 0 --max_steps 0 --seed -1 --max_eval_samples 0 --output_dir ."
    done = run_command(sys.executable, "-m", "training.chat", "x", *bad.split(), cwd=tmp_path, exit_code=2)
    for text in (
        "5 problems with the settings",
        "learning_rate=0.0: input should be greater than 0",
        "max_steps=0: input should be greater than or equal to 1",
        "seed=-1: input should be greater than or equal to 0",
        "max_eval_samples=0: input should be greater than or equal to 1",
        "output_dir=. exists",
    ):
        assert text in done.stderr
