"""HellaSwag against EleutherAI's harness and against build-nanogpt's loop over items."""

import contextlib
import json
import os
import sys

import pytest
import torch
from conftest import DATA, ROOT, launch, needs_compiler, run_command
from standin_hub import serve_dataset

from benchmarks.evaluation import one_item_at_a_time
from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import gpt2_tokenizer
from eval.common.devices import make_accelerator
from eval.common.models import compile_blocks, load_model
from eval.hellaswag import HellaSwag, read_items
from modeling import GPTConfig, GPTModel

TOLERANCE = 2e-3  # nats, of sums of some 300: float32 logits summed in another order


HELLASWAG = DATA / "hellaswag.jsonl"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A checkpoint of random weights, large enough for endings to differ in likelihood, with GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_positions=256, initializer_range=0.2))
    model.save_pretrained(folder)
    gpt2_tokenizer().save(folder)
    return folder


def loop_over_items(folder, items):
    """Summed and mean loss of each ending by build-nanogpt's loop with stock GPT-2, and with tiktoken if possible."""
    import tiktoken
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encode = tiktoken.get_encoding("gpt2").encode if len(tokenizer) == 50257 else tokenizer.encode
    return zip(*one_item_at_a_time(model, encode, items), strict=True)


def in_the_harness(folder, data, limit, here):
    """Returns summed losses of the endings, whether each item is right for acc and acc_norm, and the two scores."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (here / "data" / "evaluation").mkdir(parents=True)
    (here / "data" / "evaluation" / "hellaswag_val.jsonl").symlink_to(data.resolve())
    with contextlib.chdir(here):
        found = lm_eval.simple_evaluate(
            "hf",
            {"pretrained": str(folder), "dtype": "float32"},
            ["hellaswag_local"],
            task_manager=TaskManager(include_path=str(ROOT / "eval" / "tasks")),
            limit=limit,
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    scores = found["results"]["hellaswag_local"]
    return (
        [[-float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        [(sample["acc"], sample["acc_norm"]) for sample in samples],
        (scores["acc,none"], scores["acc_norm,none"]),
    )


def evaluate(folder, items, rule, batch_size=16, compiled=False):
    accelerator = make_accelerator()
    model, tokenizer = load_model(str(folder), accelerator.device)
    if compiled:
        compile_blocks(model)
    return HellaSwag.prepare(items, rule, tokenizer).evaluate(accelerator, model, batch_size)


def chosen(costs):
    return [row.index(min(row)) for row in costs]


def check_against_both(folder, data, limit, here):
    """Every item's losses and choices, by both rules."""
    items = read_items(data)[:limit]
    result = evaluate(folder, items, "completion")
    sums, means = loop_over_items(folder, items)
    torch.testing.assert_close(torch.tensor(result.nats), torch.tensor(sums), atol=TOLERANCE, rtol=0, check_dtype=False)
    labels = [item["label"] for item in items]
    assert result.acc == sum(a == b for a, b in zip(chosen(sums), labels, strict=True)) / len(items)
    assert result.acc_norm == sum(a == b for a, b in zip(chosen(means), labels, strict=True)) / len(items)
    assert chosen(result.nats) == chosen(sums)

    result = evaluate(folder, items, "lm_eval")
    losses, correct, scores = in_the_harness(folder, data, limit, here)
    torch.testing.assert_close(torch.tensor(result.nats), torch.tensor(losses), atol=TOLERANCE, rtol=0)
    assert chosen(result.nats) == chosen(losses)
    normed = [
        [n / len(e) for n, e in zip(*pair, strict=True)] for pair in zip(result.nats, choices(items), strict=True)
    ]
    ours = [
        (float(sums == label), float(norm == label))
        for sums, norm, label in zip(chosen(result.nats), chosen(normed), labels, strict=True)
    ]
    assert ours == correct
    assert (result.acc, result.acc_norm) == pytest.approx(scores, abs=1e-12)


def choices(items):
    from lm_eval.tasks.hellaswag.utils import preprocess

    return [[preprocess(ending) for ending in item["endings"]] for item in items]


@pytest.mark.clients
def test_items_agree_with_the_harness_and_with_the_loop_over_items(random_model, tmp_path):
    """Some items have the tags of WikiHow's layout, as in the original file."""
    items = read_items(HELLASWAG)[50:60]
    for n, tag in enumerate(["[header] ", " [title] a title", " [step]", "  [substeps] ", " [title]"] * 2):
        item = {**items[n], "ctx_a": items[n]["ctx_a"] + tag, "ctx_b": "" if n < 5 else items[n]["ctx_b"]}
        items.append({**item, "endings": [tag + ending + tag for ending in item["endings"]]})
    path = tmp_path / HELLASWAG.name
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    check_against_both(random_model, path, 20, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 60])
def test_all_items_agree(whole_sets, data_folder, tmp_path, steps):
    """For random and for trained weights, with a small vocabulary."""
    data = whole_sets / "hellaswag_val.jsonl"
    size = ["--n_layer", "2", "--n_embd", "48", "--n_head", "3", "--n_positions", "512", "--max_steps", str(steps or 1)]
    size += ["--learning_rate", "3e-3" if steps else "1e-12", "--warmup_steps", "0", "--sample_every", "0"]
    size += ["--val_tokens", "4096", "--per_device_train_batch_size", "4"]
    launch("--data", data_folder, "--output_dir", "runs/some", *size, cwd=tmp_path)
    checkpoint = tmp_path / "runs" / "some" / "checkpoints" / f"step_{steps or 1:08d}"
    check_against_both(checkpoint, data, 10_042, tmp_path)
    items = read_items(data)
    for rule in ("completion", "lm_eval"):
        expected = evaluate(checkpoint, items, rule, batch_size=64)
        assert expected.truncated == 0
        for options in ({"batch_size": 1}, {"batch_size": 7}, {"compiled": True}):
            result = evaluate(checkpoint, items, rule, **options)
            assert (result.acc, result.acc_norm) == (expected.acc, expected.acc_norm), options
            assert chosen(result.nats) == chosen(expected.nats), options


@needs_compiler
@pytest.mark.parametrize("rule", ["completion", pytest.param("lm_eval", marks=pytest.mark.slow)])
def test_batch_size_and_compilation_change_nothing(random_model, rule):
    items = read_items(HELLASWAG)[40:80]
    expected = evaluate(random_model, items, rule, batch_size=64)
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 3, "compiled": True}):
        result = evaluate(random_model, items, rule, **options)
        assert (result.acc, result.acc_norm) == (expected.acc, expected.acc_norm)
        assert chosen(result.nats) == chosen(expected.nats)
        torch.testing.assert_close(torch.tensor(result.nats), torch.tensor(expected.nats), atol=1e-3, rtol=0)


@pytest.mark.slow  # a run on two processes is compared with this command in test_harness.py
def test_two_processes_score_as_one_does(random_model, tmp_path):
    command = ["-m", "eval.hellaswag", random_model, "--data", HELLASWAG, "--limit", "30", "--output"]
    run_command(sys.executable, *command, tmp_path / "one.json", cwd=ROOT)
    config = ROOT / "accelerate_configs" / "cpu_ddp.yaml"
    done = run_command(
        "accelerate", "launch", "--config_file", config, *command, tmp_path / "two.json", "--batch_size", "7", cwd=ROOT
    )
    assert done.stdout.count("completion") == 1, "every process reported"
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for first, second in zip(one, two, strict=True):
        nats = torch.tensor(first.pop("nats")), torch.tensor(second.pop("nats"))
        torch.testing.assert_close(*nats, atol=1e-3, rtol=0)
        assert first == second
    assert [result["rule"] for result in one] == ["completion", "lm_eval"] and one[0]["items"] == 30


def test_contexts_that_do_not_fit_are_cut_and_counted(tmp_path):
    torch.manual_seed(0)
    GPTModel(GPTConfig(n_layer=1, n_embd=16, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    gpt2_tokenizer().save(tmp_path)
    items = read_items(HELLASWAG)[50:70]
    result = evaluate(tmp_path, items, "completion")
    question = HellaSwag.prepare(items, "completion", load_model(str(tmp_path))[1]).questions
    too_long = sum(len(q.context) + max(map(len, q.endings)) > 65 for q in question)
    assert result.truncated == too_long > 0
    assert f"{too_long} contexts cut from the left" in str(result)


GOOD = {"activity_label": "A", "ctx": "a b", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d", "e", "f"], "label": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(GOOD), "{"], "line 2: not JSON"),
        ([json.dumps(GOOD), "[1]"], r"line 2: \[1\]: input should be an object"),
        ([json.dumps({**GOOD, "label": 4})], "line 1: label 4 is not one of 0 to 3"),
        ([json.dumps({**GOOD, "label": True})], "line 1: label"),
        ([json.dumps(GOOD), "", json.dumps({**GOOD, "label": ""})], "line 3: label '' is not one of 0 to 3"),
        ([json.dumps({k: v for k, v in GOOD.items() if k != "ctx_b"})], "line 1: ctx_b is missing"),
        ([json.dumps({**GOOD, "ctx_a": ""})], "line 1: ctx_a='': string should have at least 1 character"),
        ([json.dumps({**GOOD, "endings": ["c", " "]})], "line 1: endings.1=' ': value error, is empty"),
        ([json.dumps({**GOOD, "endings": ["c", " [title] "]})], "line 1: endings.1="),
        ([json.dumps({**GOOD, "endings": ["c"]})], "line 1: endings=.*at least 2"),
        ([""], "there is nothing in it"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, lines, message):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        read_items(path)


@pytest.mark.clients
def test_items_come_from_the_hub(tmp_path):
    """In a new process, with a replacement of the Hub; the Hub has labels as text."""
    program = (
        "import sys; from eval.hellaswag import read_items; from data_prep.common.command_line import run\n"
        "for name in sys.argv[1:]: run(lambda: print(read_items(None, name)))"
    )
    files = {"data/validation.jsonl": json.dumps({**GOOD, "label": "1", "ctx": "from the hub"}).encode()}
    with serve_dataset("someone/swag", files) as (endpoint, _):
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        names = ["someone/swag", "someone/other"]
        done = run_command(sys.executable, "-c", program, *names, cwd=ROOT, env=env, exit_code=2)
    assert "from the hub" in done.stdout and "'label': '1'" in done.stdout
    assert done.stderr.startswith("error: cannot download someone/other") and "--data" in done.stderr
    assert done.stderr.count("\n") == 1
