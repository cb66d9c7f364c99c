"""The commands of eval on a checkpoint, against stock transformers."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import needs_compiler, run_command
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.common.command_line import UserError, run
from data_prep.sharding.manifest import Manifest
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source
from data_prep.tokenization.tokenizer import hf_tokenizer, load_tokenizer
from eval.common.generation import Sampling, generate
from eval.common.models import check_folder, from_pretrained, load_model, read_config
from eval.hellaswag import HellaSwag
from eval.loss import language_modeling_scores, read_tokens, summed_loss, windows
from training.publish import _settings as publish_settings
from training.settings.reading import parse_config


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run.checkpoints[-1]


@pytest.mark.parametrize("stride", [32, 20, 1])
def test_loss_of_a_text_file(checkpoint, text_files, tmp_path, stride):
    """Loss, perplexity and bits per byte of a whole file, against stock GPT-2 window by window."""
    file = text_files / "json_decoder.txt"
    if stride == 1:
        file = tmp_path / "short.txt"
        file.write_text((text_files / "json_decoder.txt").read_text()[:1000])
    command = [sys.executable, "-m", "eval.loss", checkpoint, "--data", file, "--stride", stride]
    done = run_command(*command, cwd=tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(file.read_text(), verbose=False)["input_ids"]])
    nats, end = 0.0, 0
    with torch.no_grad():
        while end < len(ids) - 1:
            predicted, end = end, min(end + stride if end else 32, len(ids) - 1)
            window = ids[max(0, end - 32) : end + 1]
            losses = F.cross_entropy(model(window[None, :-1]).logits[0].double(), window[1:], reduction="none")
            nats += losses[predicted - end :].sum().item()
    loss, size = nats / (len(ids) - 1), len(file.read_bytes())
    expected = f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, {nats / math.log(2) / size:.4f} bits"
    assert done.stdout.startswith(expected), done.stdout
    shown = "windows of 32" if stride == 32 else f"windows of 32 every {stride}"
    assert f"({len(ids) - 1:,} tokens, {shown})" in done.stdout


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\rb\r"])
def test_the_text_of_a_loss_has_neither_byte_order_marks_nor_carriage_returns(data_folder, tmp_path, content):
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizer")
    (tmp_path / "a.txt").write_bytes(content)
    tokens, text_bytes = read_tokens(tmp_path / "a.txt", tokenizer)
    assert (tokenizer.decode(tokens[1:]), text_bytes) == ("a\nb\n", 4)


def test_loss_of_a_data_folder_covers_its_whole_validation_split(checkpoint, data_folder, tmp_path):
    done = run_command(sys.executable, "-m", "eval.loss", checkpoint, "--data", data_folder, cwd=tmp_path)
    assert "(20,010 tokens, windows of 32)" in done.stdout


def test_generated_text_is_that_of_stock(checkpoint, tmp_path):
    command = [sys.executable, "-m", "eval.generate", checkpoint, "--prompt", "def ", "--max_new_tokens", "20"]
    done = run_command(*command, "--temperature", "0", cwd=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("def ")["input_ids"]]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert done.stdout.strip() == tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_a_template_of_the_tokenizer_adds_no_tokens(checkpoint, tmp_path):
    """Preparation writes none, so evaluation must not: after an end of text the model would begin another text."""
    from tokenizers import processors

    from eval.common.harness_model import GPTModelLM

    model, plain = load_model(str(checkpoint), torch.device("cpu"))
    ends = AutoTokenizer.from_pretrained(checkpoint)
    template = {"single": "<|endoftext|> $A <|endoftext|>", "special_tokens": [("<|endoftext|>", plain.eos_token_id)]}
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(**template)
    ends.save_pretrained(tmp_path)
    text = "def f(x):"
    (tmp_path / "text.txt").write_text(text)
    ids = plain(text)["input_ids"]
    assert ends(text)["input_ids"] == [plain.eos_token_id, *ids, plain.eos_token_id]
    assert load_tokenizer(tmp_path).encode([text]).tolist() == [plain.eos_token_id, *ids]
    assert read_tokens(tmp_path / "text.txt", ends)[0].tolist() == [plain.eos_token_id, *ids]
    texts = [generate(model, tokenizer, text, Sampling(max_new_tokens=8)).texts for tokenizer in (plain, ends)]
    assert texts[0] == texts[1]
    items = [{"activity_label": "A", "ctx": "the a", "ctx_a": "the", "ctx_b": "a", "endings": ["b", "c"], "label": 0}]
    for rule in ("completion", "lm_eval"):
        assert HellaSwag.prepare(items, rule, ends) == HellaSwag.prepare(items, rule, plain)
    assert GPTModelLM(pretrained=model, tokenizer=ends).tok_encode(text) == ids


def test_samples_depend_on_their_seed_alone(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    model.train()
    one, other = (Sampling(max_new_tokens=16, temperature=1.0, top_k=0, seed=seed) for seed in (1, 2))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = generate(model, tokenizer, "import ", one)
    assert torch.equal(torch.rand(3), expected), "training's random numbers were drawn from"
    assert model.training
    assert first == generate(model, tokenizer, "import ", one)
    assert first != generate(model, tokenizer, "import ", other)


def test_a_prompt_longer_than_the_context_is_cut_from_its_left(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    long, short = ("x = 1\n" * count + "def f" for count in (100, 90))
    results = [
        generate(model, tokenizer, prompt, Sampling(max_new_tokens=8, temperature=0)) for prompt in (long, short)
    ]
    assert results[0].texts == results[1].texts != [""]
    assert results[0].left_out == 1 + len(tokenizer(long, verbose=False)["input_ids"]) - (32 - 8)


def test_a_short_prompt_is_kept_whole_however_much_is_asked_for(checkpoint):
    """Instead the continuation is truncated to the context of 32 tokens."""
    model, tokenizer = load_model(str(checkpoint))
    (some,), (many,) = (
        generate(model, tokenizer, "def f", Sampling(max_new_tokens=count, temperature=0)).texts for count in (10, 200)
    )
    assert many.startswith(some) and len(tokenizer("def f" + many)["input_ids"]) <= 31


def test_a_torch_for_cuda_works_without_a_gpu(checkpoint, monkeypatch):
    """As from PyPI on every laptop: torch names the device that it was built for, even if there is none."""
    monkeypatch.setattr("torch._C._accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    model, _ = load_model(str(checkpoint))
    assert model.device == torch.device("cpu")


def test_generation_asks_for_no_plan_of_cudnn(checkpoint):
    """It would make one for each new length; training has one length."""
    seen = []
    model, tokenizer = load_model(str(checkpoint))
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    generate(model, tokenizer, "def", Sampling(max_new_tokens=3))
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_truncated_model_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="copy'"):
        load_model(str(folder))


def test_another_folder_than_a_model_is_recognized(tiny_run, data_folder, tmp_path, monkeypatch):
    """By all that load one, with the checkpoint that may have been meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "runs").symlink_to(tiny_run.folder.parent)
    run, last = f"runs/{tiny_run.folder.name}", tiny_run.checkpoints[-1].name
    shutil.copytree(tiny_run.checkpoints[-1], tmp_path / "step_9", ignore=shutil.ignore_patterns("*.safetensors"))
    with_checkpoints = f"it is a folder with checkpoints, such as {run}/checkpoints/{last}"
    expected = {
        str(data_folder): "this folder has no model (config.json and model.safetensors); it is a data folder",
        f"{data_folder}/tokenizer": f"; it is a part of {data_folder}, a data folder",
        run: with_checkpoints,
        f"{run}/checkpoints/": with_checkpoints,
        f"{run}/checkpoints/step_7": f"it is missing; {run}/checkpoints is a folder with checkpoints, such as {run}",
        f"{run}/checkpoints/{last}/training_state": f"it is a part of {run}/checkpoints/{last}, a model",
        f"{run}/checkpoints/{last}/model.safetensors": f"it is a file; its folder is {run}/checkpoints/{last}",
        "gpt2": "; rename it, or call from elsewhere, to load the Hub's model of that name",
        "step_9": "this folder has no model",
        "./step_8": "it is missing",
    }
    for name, message in expected.items():
        for load in (load_model, from_pretrained, read_config, check_folder):
            with pytest.raises(UserError, match=re.escape(message)) as caught:
                load(name)
            assert str(caught.value).startswith(f"model {name!r}: ") and "\n" not in str(caught.value)
    assert set(os.listdir("gpt2")) == set()


def test_a_model_or_a_run_is_recognized_where_data_or_a_run_are_expected(tiny_run, data_folder, tmp_path):
    checkpoint = tiny_run.checkpoints[-1]
    with_checkpoints = f"it is a folder with checkpoints, such as {checkpoint}"

    def branch_off(path):
        parse_config(["--resume_from_checkpoint", str(path)])

    tokenizer = f"no tokenizer in it; it is a data folder; its tokenizer is {data_folder}/tokenizer"
    expected = [
        (Manifest.read, checkpoint, "not a data folder (no manifest.json); it is a model; prepare one"),
        (Manifest.read, tiny_run.folder, f"; {with_checkpoints}; prepare one"),
        (open_source, Source(str(checkpoint)), "is no folder of documents; it is a model"),
        (open_source, Source(str(data_folder)), "is no folder of documents; it is a data folder"),
        (hf_tokenizer, data_folder, tokenizer),
        (hf_tokenizer, tmp_path, "no tokenizer in it; copy tokenizer.json and its config there"),
        (branch_off, tiny_run.folder, f"is not a checkpoint ({with_checkpoints})"),
        (publish_settings, checkpoint, f"(no config.yaml); it is a part of {tiny_run.folder}; name that, and --step"),
        (publish_settings, data_folder, "(no config.yaml); it is a data folder"),
    ]
    for use, path, message in expected:
        with pytest.raises(UserError, match=re.escape(message)):
            use(path)


def test_another_tokenizer_is_refused(checkpoint, text_files, tmp_path):
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source

    other = tmp_path / "other"
    prepare(Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=400, shard_tokens=20_011), other)
    with pytest.raises(UserError, match=r"other was written with another tokenizer \(bpe-400\)"):
        read_tokens(other, AutoTokenizer.from_pretrained(checkpoint))


def test_loss_is_the_rolling_loglikelihood_of_the_harness(checkpoint, text_files):
    """In its windows: loss, perplexity and bits per byte of the same text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    file = text_files / "email_message.txt"
    text = file.read_text()
    harness = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=8)
    (loglikelihood,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])

    model, tokenizer = load_model(str(checkpoint))
    tokens, text_bytes = read_tokens(file, tokenizer)
    nats, count = summed_loss(model, windows(tokens, 32, 32, 8))
    scores = language_modeling_scores(nats, count, text_bytes)
    assert count == len(harness.tok_encode(text))
    assert scores["loss"] == pytest.approx(-loglikelihood / count, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(-loglikelihood / count), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(-loglikelihood / math.log(2) / len(text.encode()), rel=1e-6)


def test_bits_per_byte_where_tokens_do_not_spell_the_text(text_files, tmp_path, monkeypatch, capsys):
    """With WordPiece: of a text file, of a data folder's validation, and of a part of it, as in a run; without the
    source's size in the manifest there is no such number."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source
    from eval.loss import main
    from modeling import GPTConfig, GPTModel
    from training.engine.data import load_data
    from training.settings.reading import parse_config

    file, folder, model = text_files / "json_decoder.txt", tmp_path / "data", tmp_path / "model"
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train([str(file)], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["</s>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(model)
    GPTModel(GPTConfig(n_layer=1, n_embd=8, n_head=1, n_positions=32, vocab_size=300)).save_pretrained(model)
    texts = [path.read_text() for path in sorted(text_files.iterdir())]
    val = sum(len(tokenizer(text, verbose=False)["input_ids"]) + 1 for text in texts[:4])
    prepare(Recipe(Source(str(text_files)), tokenizer=str(model), shard_tokens=val), folder)

    def printed(data):
        monkeypatch.setattr("sys.argv", ["eval.loss", str(model), "--data", str(data)])
        main()
        return capsys.readouterr().out

    for data, size in ((file, file.stat().st_size), (folder, sum(len(text.encode()) for text in texts[:4]))):
        loss, _, bits, count = map(float, re.findall(r"\d+\.?\d*", printed(data).replace(",", ""))[:4])
        assert bits == pytest.approx(loss * count / math.log(2) / size, abs=2e-4)

    config = parse_config(["--data", str(folder), "--sequence_length", "32"])
    data = load_data(config)
    sequences = (sum(len(tokenizer(text, verbose=False)["input_ids"]) + 1 for text in texts[:2]) - 1) // 32
    found = data.val_text_bytes(data.batches(config, "val"), sequences, tokenizer)
    assert found == pytest.approx(sum(len(text.encode()) for text in texts[:2]), rel=0.02)

    path = folder / "manifest.json"
    path.write_text(re.sub(r',\s*"text_bytes": \d+', "", path.read_text()))  # as earlier versions have written it
    assert "bits per byte not available (" in printed(folder)
    assert load_data(config).val_text_bytes(data.batches(config, "val"), sequences, tokenizer) is None


def test_several_continuations_a_line_of_input_each(checkpoint, tmp_path):
    command = [sys.executable, "-m", "eval.generate", str(checkpoint), "--num_return_sequences", "2", "--top_p", "0.9"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "5"], cwd=tmp_path, input="def f\nx = \n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("---")] == ["--- 1", "--- 2"] * 2
    assert done.stdout.count("def f") == 2 <= done.stdout.count("x = ")
    assert done.stderr.count(" a second]") == 2


@needs_compiler
def test_a_compiled_model_generates_the_same(checkpoint):
    """With one graph, whatever the prompt's length."""
    torch.compiler.reset()
    counters.clear()
    model, tokenizer = load_model(str(checkpoint))
    graphs = []
    for prompt in ("def f", "import os, sys", "x"):
        sampling = Sampling(max_new_tokens=10, temperature=1.0)
        expected = generate(model, tokenizer, prompt, sampling)
        assert generate(model, tokenizer, prompt, sampling, compiled=True) == expected
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.loss", "no/such/model", "--data", "x.txt"], "error: model 'no/such/model'"),
        (["eval.loss", "CHECKPOINT", "--data", "x.txt"], "error: [Errno 2] No such file or directory: 'x.txt'"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--length", "33"], "error: length=33: a window has between 1 and"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--length", "0"], "error: length=0: a window has between 1 and"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--batch_size", "-1"], "error: batch_size=-1 must be at least 1"),
        (["eval.generate", "CHECKPOINT", "--promt", "x"], "unknown '--promt'; did you mean '--prompt'?"),
        (["eval.generate", "CHECKPOINT", "--temperature", "-1"], "error: temperature and top_k must be at least 0"),
        (["eval.generate", "CHECKPOINT", "--top_p", "0"], "error: top_p=0.0 must be greater than 0 and at most 1"),
        (["eval.loss", "CHECKPOINT", "--data", "x", "--stride", "33"], "error: stride=33 must lie between 1 and"),
        (["eval.generate", "ENDLESS", "--prompt", "x"], "endless' has no end-of-text token (eos_token)"),
        (["eval.loss", "BARE", "--data", "x"], "bare': no tokenizer in it; copy tokenizer.json"),
        (["eval.hellaswag", "CHECKPOINT", "--data", "x"], "error: [Errno 2] No such file or directory: 'x'"),
        (["eval.hellaswag", "CHECKPOINT", "--rules", "mine"], "invalid choice: 'mine'"),
        (["eval.harness", "BARE", "--tasks", "hellaswag"], "bare': no tokenizer in it"),
        pytest.param(
            ["eval.harness", "CHECKPOINT", "--tasks", "helaswag"],
            "task unknown 'helaswag'; did you mean 'hellaswag'?",
            marks=pytest.mark.slow,  # the harness reads all of its tasks
        ),
        (["eval.report", "no/such/run"], "error: no/such/run: not a run folder or log"),
        (["eval.report", "x", "--batch_tokens", "0"], "error: batch_tokens=0 must be at least 1"),
    ],
)
def test_bad_input_gets_one_line(checkpoint, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    endless = shutil.copytree(checkpoint, tmp_path / "endless")
    (endless / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    named = {"CHECKPOINT": str(checkpoint), "BARE": str(bare), "ENDLESS": str(endless)}
    monkeypatch.setattr("sys.argv", [named.get(word, word) for word in words])
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(words[0]).main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
