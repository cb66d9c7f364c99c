"""EleutherAI's harness: its plain command on our checkpoints, our command, and evaluations during a run."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, launch, run_command
from plants import signalled_in_evaluation

from data_prep.common.command_line import UserError
from eval.harness import check_tasks, load_tasks
from eval.reporting.records import of_the_same_size

TASKS = "lambada_local,wikitext_local"


@pytest.fixture(scope="module")
def manager():
    return check_tasks(["gpt2_zero_shot", "gpt3_zero_shot"])


def members(manager, group):
    """The settings of each task of a group, by its name, as the installed harness and the group have them."""
    tasks = [task if isinstance(task, dict) else {"task": task} for task in manager.task_index[group].cfg["task"]]
    assert {task["task"] for task in tasks} <= set(manager.all_tasks)
    return {task["task"]: {**manager.task_index[task["task"]].cfg, **task} for task in tasks}


@pytest.mark.clients
@pytest.mark.parametrize(("group", "at_least"), [("gpt2_zero_shot", 7), ("gpt3_zero_shot", 30)])
def test_the_code_of_each_task_of_a_group_can_be_imported(manager, group, at_least):
    """A task whose code cannot be imported would end the whole group."""
    found = members(manager, group)
    assert len(found) >= at_least
    for task, settings in found.items():
        functions = [value for value in settings.values() if isinstance(value, str) and value.startswith("/")]
        for module, _, name in (value.rpartition(".") for value in functions):
            assert name in runpy.run_path(f"{module}.py"), task


@pytest.mark.clients
def test_published_scores_are_of_metrics_that_the_group_has(manager):
    found = members(manager, "gpt3_zero_shot")
    (gpt3,) = (model for model in of_the_same_size(760e6) if model.harness)
    assert gpt3.name == "GPT-3 760M" and gpt3.harness["lambada_openai", "perplexity"] == 6.53
    assert {task for task, _ in gpt3.harness} <= found.keys() | {"coqa", "record"}
    for task, metric in gpt3.harness:
        if "metric_list" in found.get(task, {}):
            assert metric in {one["metric"] for one in found[task]["metric_list"]}, task


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_files):
    """A folder to run in, with files for the tasks that read local ones."""
    here = tmp_path_factory.mktemp("harness")
    evaluation = here / "data" / "evaluation"
    evaluation.mkdir(parents=True)
    texts = [path.read_text() for path in sorted(text_files.glob("json*.txt"))]
    sentences = [" ".join(text.split()[20 * n : 20 * n + 12]) for text in texts for n in range(4)]
    write_lines(evaluation / "lambada_test.jsonl", [{"text": text} for text in sentences])
    write_lines(evaluation / "wikitext2_test.jsonl", [{"page": text[:600]} for text in texts])
    item = {"activity_label": "A", "ctx": "the a", "ctx_a": "the", "ctx_b": "a"}
    items = [{**item, "endings": ["b", "of it", "in (", f"{n}"], "label": n % 4} for n in range(9)]
    write_lines(evaluation / "hellaswag_val.jsonl", items)
    return here


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def scores(path):
    results = json.loads(path.read_text())["results"]
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, found in results.items()
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@pytest.fixture(scope="module")
def plain(tiny_run, folder):
    """Scores of a checkpoint by the plain command, with no flags of ours."""
    arguments = f"pretrained={tiny_run.checkpoints[-1]}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", TASKS]
    run_command(*command, "--include_path", ROOT / "eval" / "tasks", "--output_path", "plain.json", cwd=folder)
    (results,) = folder.glob("plain_*.json")
    return scores(results)


@pytest.mark.clients
def test_the_plain_command_works_on_a_checkpoint(plain):
    assert {"lambada_local/acc", "lambada_local/perplexity", "wikitext_local/bits_per_byte"} <= plain.keys()
    assert plain["lambada_local/perplexity"] > 1 and 1 < plain["wikitext_local/bits_per_byte"] < 6


@pytest.mark.clients
@pytest.mark.parametrize(("tokens", "words"), [(32, []), (256, ["--stock"])], ids=["of the task", "by default"])
def test_a_task_that_generates_the_whole_context_is_refused_before_anything_runs(tiny_run, tmp_path, tokens, words):
    """By the command as by a run, in the same words."""
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n')
    count = "" if words else f"  max_new_tokens: {tokens}\n"
    task = tmp_path / "long.yaml"
    task.write_text(
        f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/data.jsonl}}\ntest_split: train\n"
        f"output_type: generate_until\ndoc_to_text: text\ndoc_to_target: text\n"
        f"generation_kwargs:\n  until: ['x']\n{count}"
    )
    expected = f"task 'long' generates {tokens} tokens, which leaves no room for a prompt in a context of 32"
    if not words:
        with pytest.raises(UserError, match=f"^{expected}; leave it out$"):
            load_tasks([str(task)], n_positions=32)
    command = [sys.executable, "-m", "eval.harness", str(tiny_run.checkpoints[-1]), "--tasks", str(task), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: {expected}; leave it out"
    assert "Traceback" not in done.stderr and "Running" not in done.stderr


@pytest.mark.clients
def test_gptmodel_scores_as_the_plain_command_finds(tiny_run, plain, folder):
    """Other options go to the harness; the results are beside the checkpoint."""
    checkpoint = folder / "step_00000020"
    checkpoint.symlink_to(tiny_run.checkpoints[-1])
    command = [sys.executable, "-m", "eval.harness", checkpoint, "--tasks", TASKS, "--batch_size", "3"]
    done = run_command(*command, cwd=folder)
    assert "gpt-accelerate (" in done.stdout and "batch_size: 3" in done.stdout
    (results,) = folder.glob("step_00000020.lm_eval_*.json")
    assert scores(results) == pytest.approx(plain, rel=1e-5)


@pytest.mark.clients
@pytest.mark.parametrize("config", ["cpu", "cpu_ddp"])
def test_evaluations_in_a_run_change_nothing_and_agree_with_those_alone(tiny_run, train, plain, folder, config):
    """On one and on two processes: the losses of a run without them, the scores of the commands on its checkpoint."""
    words = "--max_steps 20 --per_device_train_batch_size 8 --eval_steps 5 --save_steps 5 --sample_every 10"
    words += " --hellaswag_every 10 --lm_eval_every 20 --lm_eval_tasks"
    flags = [*words.split(), *TASKS.split(",")]
    flags += ["--hellaswag_data", folder / "data" / "evaluation" / "hellaswag_val.jsonl"]
    run = train(f"evaluated_{config}", *flags, launch_file=config, cwd=folder)
    if config == "cpu":
        assert run.losses() == tiny_run.losses()
    else:
        assert run.losses() == pytest.approx(tiny_run.losses(), rel=1e-5)

    metrics = run.metrics()
    last = metrics[20]
    found = {name.removeprefix("lm_eval/"): value for name, value in last.items() if name.startswith("lm_eval/")}
    assert found == pytest.approx(plain, rel=1e-4)
    assert found == pytest.approx(scores(run.folder / "checkpoints" / "step_00000020.lm_eval.json"))

    command = [sys.executable, "-m", "eval.hellaswag", run.folder / "checkpoints" / "step_00000020"]
    run_command(*command, "--data", "data/evaluation/hellaswag_val.jsonl", "--output", "swag.json", cwd=folder)
    result = next(one for one in json.loads((folder / "swag.json").read_text()) if one["rule"] == "completion")
    assert all(last[f"hellaswag/completion/{score}"] == result[score] for score in ("acc", "acc_norm"))
    lines = (run.folder / "log.txt").read_text().splitlines()
    hella = [line.split() for line in lines if " hella " in line]
    assert [int(step) for step, _, _ in hella] == [0, 10, 20]
    assert float(hella[-1][2]) == pytest.approx(last["hellaswag/completion/acc_norm"], abs=1e-4)


@pytest.mark.clients
def test_a_rank_that_is_asked_to_stop_in_the_harness_stops_all(short_steps, folder, tmp_path):
    plant = pickle.dumps(partial(signalled_in_evaluation, 4 + 2, 1)).hex()  # after its half of a validation
    environment = os.environ | {"PLANT": plant, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    flags = [*short_steps, "--max_steps", "4", "--lm_eval_every", "2", "--output_dir", tmp_path / "run"]
    started = {"cwd": folder, "launch_file": "cpu_ddp", "script": "tests/planted_train.py", "env": environment}
    done = launch(*flags, "--lm_eval_tasks", *TASKS.split(","), **started)
    assert "stopped after step 2 (another process was asked to)" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "COMPLETE").exists()
