"""Settings: who overrides whom, and every problem at once."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from data_prep.common.command_line import UserError
from eval.common import devices
from eval.common.devices import chosen_precision
from eval.common.launch import on_cpu
from modeling import PRESETS
from training.settings.reading import load_config, parse_config

from conftest import ROOT  # isort: skip


ACCELERATE_CONFIGS = {"cpu": "NO", "single_gpu": "NO", "mps": "NO", "fsdp2": "FSDP", "fsdp2_multi_node": "FSDP"}
ACCELERATE_CONFIGS |= dict.fromkeys(("cpu_ddp", "ddp", "multi_node"), "MULTI_GPU")


def test_flags_over_file_over_preset_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "preset: gpt2-124m\nlearning_rate: 6e-4\nn_layer: 6\nsample_prompts: [one two, three]\n"
        "resume_from_checkpoint: true\n"
    )
    config = parse_config([str(file), "--n_layer", "3", "--eval-steps", "7"])
    assert config.model.n_layer == 3  # flag
    assert config.optimizer.learning_rate == 6e-4 and config.run.resume_from_checkpoint == "newest"  # file
    assert config.evaluation.sample_prompts == ["one two", "three"]
    assert config.model.n_embd == PRESETS["gpt2-124m"].n_embd  # preset
    assert config.optimizer.weight_decay == 0.1  # default
    assert config.evaluation.eval_steps == 7
    assert parse_config([str(file), "--preset", "gpt2-350m"]).model.n_embd == 1024
    assert parse_config(["--preset=gpt2-350m"]).model.n_embd == 1024


def test_a_length_in_steps_overrides_one_in_tokens_of_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("max_tokens: 20480\nwarmup_tokens: 4096\n")
    assert parse_config([str(file)]).max_steps == 10
    config = parse_config([str(file), "--max_steps", "30", "--warmup_steps", "3"])
    assert (config.max_steps, config.schedule.unit, config.schedule.warmup) == (30, "steps", 3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "none"), (["--gradient_checkpointing"], "full"), (["--gradient_checkpointing", "false"], "none"),
     (["--gradient_checkpointing", "selective"], "selective")],
)  # fmt: skip
def test_gradient_checkpointing_may_be_true_as_in_training_arguments(flags, expected):
    assert parse_config(flags).devices.gradient_checkpointing == expected


def test_written_settings_give_the_same_run_again(tmp_path):
    config = parse_config(["--preset", "gpt3-125m", "--learning_rate", "1e-5", "--sample_prompts", "a b", "c"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config([str(file)]) == config


@pytest.mark.parametrize("file", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_we_ship(file, tmp_path):
    settings = yaml.safe_load(file.read_text())
    for processes in (1, 2, 4, 8):
        config = load_config([str(file), "--data", str(tmp_path)], processes)
    written = config.to_dict()
    assert {name: written[name] for name in settings if name != "data"} == {
        name: value for name, value in settings.items() if name != "data"
    }


@pytest.mark.parametrize(
    ("flags", "optim", "rate", "muon"),
    [
        ("", "muon", 2e-2, 6e-3),
        ("--learning_rate 1e-3", "muon", 1e-3, None),
        ("--muon_learning_rate 1e-3", "muon", 2e-2, 1e-3),
        ("--optim adamw", "adamw", 3e-3, None),
        ("--preset gpt3-125m", "adamw", 6e-4, None),
        ("--preset gpt3-125m --optim muon", "muon", 6e-4, None),
    ],
)
def test_learning_rates_that_are_not_given(flags, optim, rate, muon):
    settings = parse_config(flags.split()).optimizer
    assert (settings.optim, settings.learning_rate, settings.muon_learning_rate) == (optim, rate, muon)


def problems(*flags: str, processes: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(flags), processes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--n_layers", "2"], "unknown '--n_layers'; did you mean '--n_layer'?"),
        (["--n_layer", "many"], "n_layer='many' should be a valid integer"),
        (["--order", "random"], "order='random' should be 'shuffled' or 'sequential'"),
        (["--preset", "gpt2-123m"], "preset: unknown 'gpt2-123m'; did you mean 'gpt2-124m'?"),
        (["--n_embd", "30", "--n_head", "4"], "n_embd=30 is not a multiple of n_head=4"),
        (["--sequence_length", "512", "--batch_tokens", "4096"], "sequence_length=512 is longer than n_positions=256"),
        (["--val_tokens", "255"], "val_tokens=255 is less than one sequence of 256"),
        (["--warmup_steps", "9999"], "warmup_steps=9999 exceeds max_steps="),
        (["--max_tokens", "10240", "--warmup_steps", "9"], "warmup_steps=9 exceeds max_steps=5"),
        (["--warmup_tokens", "9999999"], "warmup_tokens=9999999 exceeds max_tokens=2048000"),
        (
            ["--cooldown_steps", "5"],
            "cooldown_steps=5 does nothing under lr_scheduler_type='cosine'; use --lr_scheduler_type wsd",
        ),
        (
            ["--lr_scheduler_type", "wsd", "--cooldown_steps", "990"],
            "cooldown_steps=990 and warmup_steps=40 exceed max_steps=",
        ),
        (
            ["--lr_scheduler_type", "wsd", "--decay_tokens", "9"],
            "decay_tokens does nothing under lr_scheduler_type='wsd'",
        ),
        (["--decay_tokens", "9"], "decay_tokens=9 must lie between the warmup's 81920 and max_tokens=2048000"),
        (["--batch_ramp_tokens", "9"], "batch_ramp_tokens=9 and batch_ramp_start=None make a ramp together; give both"),
        (
            ["--batch_ramp_start", "2048", "--batch_ramp_tokens", "4000000"],
            "batch_ramp_tokens=4000000 exceeds the 2048000 tokens of the run",
        ),
        (
            ["--batch_tokens", "6144", "--batch_ramp_start", "4096", "--batch_ramp_tokens", "9999"],
            "batch_tokens=6144 is not a multiple of batch_ramp_start=4096",
        ),
        (
            ["--per_device_train_batch_size", "many"],
            "per_device_train_batch_size='many' should be 'auto' or should be a valid integer",
        ),
        (
            ["--per_device_train_batch_size", "0"],
            "per_device_train_batch_size='0' should be 'auto' or should be greater than or equal to 1",
        ),
        (["--optim", "adamw", "--muon_learning_rate", "1"], "muon_learning_rate does nothing under optim='adamw'"),
        (
            ["--gradient_compression", "bf16"],
            "gradient_compression='bf16' does nothing in a single process; use none",
        ),
        (
            ["--resume_from_checkpoint", "no/such", "--cooldown_steps", "9"],
            "resume_from_checkpoint='no/such' is not a checkpoint",
        ),
        (["--model_name_or_path", "no/such"], "model_name_or_path='no/such': "),
        (["--max_steps", "0"], "max_steps='0' should be greater than or equal to 1"),
        (["--learning_rate", "-1"], "learning_rate='-1' should be greater than 0"),
        (["--learning_rate", "nan"], "learning_rate='nan' should be a finite number"),
        (["--dropout", "1.5"], "dropout='1.5' should be less than 1"),
        (["--min_lr_ratio", "2"], "min_lr_ratio='2' should be less than or equal to 1"),
        (["--data", "no/such"], "data='no/such': no such folder"),
        (["--run_name", "a/b"], "run_name='a/b' must end in a plain name for a folder"),
        (["no.yaml"], "no.yaml: no such file"),
    ],
)
def test_one_problem(flags, expected):
    text = problems(*flags)
    assert text.startswith(expected) and "\n" not in text


def test_all_problems_at_once():
    text = problems("--n_embd", "31", "--sequence_length", "512", "--data", "no/such", "--batch_tokens", "100")
    assert text.startswith("4 problems") and text.count("\n  - ") == 4
    text = problems("--max_steps", "0", "--data", "no/such", "--n_layer", "-1")
    assert text.startswith("3 problems")
    flags = "--cooldown_steps 9 --warmup_steps 1100 --optim adamw --muon_learning_rate 1 --report_to wandb"
    text = problems(*flags.split())
    assert text.startswith("4 problems") and "cooldown_steps=9" in text and "report_to='wandb'" in text
    text = problems("--n_layers", "2", "--n_head", "x", "--max_stepz", "3")
    assert (
        text.startswith("3 problems")
        and "--n_layer'?" in text
        and "n_head='x' should be a valid integer" in text
        and "--max_steps'?" in text
    )


def test_problems_of_compressed_gradients(monkeypatch):
    assert problems("--gradient_compression", "bf16", processes=2) == "gradient_compression='bf16' needs NCCL; use fp16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    text = problems("--gradient_compression", "fp16", processes=2)
    assert text == "gradient_compression='fp16' is for data-parallel processes, not FSDP; use none"


@pytest.mark.parametrize(
    ("processes", "flags", "batch", "micro_batch"),
    [
        (1, (), 2048, 8),
        (2, (), 2048, 4),
        (3, (), 2304, 3),
        (4, (), 2048, 2),
        (6, (), 1536, 1),
        (8, (), 2048, 1),
        (16, (), 4096, 1),
        (3, ("--per_device_train_batch_size", "2"), 1536, 2),
        (2, ("--per_device_train_batch_size", "16"), 8192, 16),
        (1, ("--n_positions", "384"), 1920, 5),
        (2, ("--batch_tokens", "10240"), 10240, 5),
        (1, ("--batch_tokens", "1024"), 1024, 4),
        (6, ("--batch_tokens", "24576"), 24576, 8),
        (2, ("--batch_tokens", "16384", "--batch_ramp_start", "4096", "--batch_ramp_tokens", "9999"), 16384, 8),
        (8, ("--preset", "gpt2-124m"), 2**19, 8),
    ],
)
def test_what_is_not_given_adapts_to_what_is(processes, flags, batch, micro_batch):
    config = load_config(list(flags), processes)
    assert config.optimizer.batch_tokens == batch and config.micro_batch(processes) == micro_batch
    assert batch % (micro_batch * config.sequence_length * processes) == 0


def test_a_short_run_has_a_short_warmup():
    assert parse_config(["--max_steps", "3"]).optimizer.warmup_steps == 3
    assert "warmup_steps=9 exceeds max_steps=3" in problems("--max_steps", "3", "--warmup_steps", "9")


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    flags = ["--batch_tokens", "10000", "--per_device_train_batch_size", "4", "--n_positions", "256"]
    assert "4 x 256 x 3 = 3072; the nearest sizes that are: 9216 or 12288" in problems(*flags, processes=3)
    assert "the nearest sizes that are: 16384" in problems(
        "--batch_tokens", "1000", "--per_device_train_batch_size", "64"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_layers: 2\n", "unknown 'n_layers'; did you mean 'n_layer'?"),
        ("n_layer: 2.5\n", "n_layer=2.5 should be a valid integer"),
        ("- a\n- b\n", "expected lines of `name: value`, found list"),
        ("n_layer: [1\n", "not a readable YAML file"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(text)
    assert expected in problems(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_takes_each_config_on_a_machine_with_gpus(name, devices, monkeypatch):
    """Its own validation, and what it would tell the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    file = ROOT / "accelerate_configs" / f"{name}.yaml"
    written = load_config_from_file(str(file))
    assert (written.compute_environment, written.distributed_type) == ("LOCAL_MACHINE", ACCELERATE_CONFIGS[name])
    assert (written.use_cpu, written.num_processes > 1) == (name == "cpu", written.distributed_type != "NO")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))
    several = written.num_processes > 1
    told = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    assert (args.num_processes, args.use_cpu) == (written.num_processes, written.use_cpu)
    assert args.multi_gpu == (written.distributed_type == "MULTI_GPU")
    assert told["ACCELERATE_MIXED_PRECISION"] == str(written.mixed_precision or "no")
    if written.distributed_type == "FSDP":
        assert (told["ACCELERATE_USE_FSDP"], told["FSDP_VERSION"]) == ("true", "2")
        assert told["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "GPTBlock"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=r"8 processes on this machine, which has 2 GPUs; give --num_processes 2"):
        devices.make_accelerator()


def test_every_accelerate_config_is_tested():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == ACCELERATE_CONFIGS.keys()


@pytest.mark.parametrize("name", ["DeepSpeed", "Megatron-LM"])
def test_another_strategy_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    assert f"the Accelerate config asks for {name}; use accelerate_configs/fsdp2.yaml" in problems()


def test_an_accelerate_config_for_the_cpu_means_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **kwargs: True)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert not on_cpu() and chosen_precision("auto") == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert on_cpu() and chosen_precision("auto") == "no"


@pytest.mark.parametrize(
    ("gpu", "capability", "precision"),
    [("A100", (8, 0), "bf16"), ("T4", (7, 5), "fp16"), ("V100", (7, 0), "fp16"), ("P100", (6, 0), "no")],
)
def test_the_precision_of_a_gpu_is_what_its_hardware_has(gpu, capability, precision, monkeypatch):
    """torch, asked for bf16 on a T4, says yes: it emulates it."""
    properties = SimpleNamespace(major=capability[0])
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported() and chosen_precision("auto") == precision
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert chosen_precision("auto") == "bf16"


def test_precision_of_flag_over_accelerate_config(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert chosen_precision("auto") == "fp16"
    assert chosen_precision("no") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert chosen_precision("bf16") == "bf16"


def test_the_scaling_plan_is_what_its_script_says():
    from benchmarks.scaling import document

    assert (ROOT / "docs" / "scaling.md").read_text() == document() + "\n"


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("training.settings.reading.find_spec", lambda name: None)
    assert problems("--report_to", "wandb") == "report_to='wandb' is not installed; pip install wandb"


def test_settings_are_read_and_refused_without_heavy_modules(tmp_path):
    """Of what is installed, only pydantic and YAML, which take a fifth of a second, not torch's and transformers' 5."""
    (tmp_path / "a.yaml").write_text("preset: gpt2-124m\n")
    program = """
import sys
before = set(sys.modules)
from data_prep.common.command_line import UserError
from training.settings.reading import load_config
load_config(["a.yaml"], 1)
for words in (["--n_layerz", "2"], ["--max_steps", "0"], ["--warmup_steps", "9999"], ["--data", "no/such"]):
    try:
        load_config(words, 1)
    except UserError as error:
        print(error, file=sys.stderr)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    installed = packages_distributions()
    loaded = {package.lower() for module in done.stdout.split() for package in installed.get(module, ())}
    light = {"annotated-types", "typing_extensions", "typing-inspection", "pyyaml", "gpt-accelerate"}
    assert loaded - light == {"pydantic", "pydantic_core"}
    assert done.stderr.count("\n") == 4


def test_what_is_wrong_with_a_mixture(data_folder):
    other = str(data_folder.parent)
    text = problems("--data", str(data_folder), other, "--data_weights", "1", "--document_mask", "true",
                    "--attn_implementation", "flash_attention_2")  # fmt: skip
    assert "data_weights=[1.0]: 1 for 2 data folders" in text
    assert "document_mask does not work with attn_implementation='flash_attention_2'" in text
    text = problems("--data", other, other, "--data_weights", "0", "nan")
    assert "names a folder twice" in text
    assert "data_weights=['0', 'nan'] should be greater than 0 or should be a finite number" in text


def test_folders_of_different_tokenizers_are_refused(data_folder, tmp_path, text_files):
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source
    from training.engine.data import load_data

    prepare(Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=300, shard_tokens=20_011), tmp_path / "other")
    config = parse_config(["--data", str(data_folder), str(tmp_path / "other"), "--sequence_length", "32"])
    with pytest.raises(
        UserError, match=r"another tokenizer than .*small; prepare it again with --tokenizer .*small/tok"
    ):
        load_data(config)


@pytest.mark.parametrize("weights", [["1", "1"], ["50", "1"], ["1", "50"]])
def test_validation_reads_no_source_beyond_its_end(data_folder, tmp_path, text_files, weights):
    from data_prep.prepare import Recipe, prepare
    from data_prep.sources.source import Source
    from training.engine.data import load_data, validation_sequences

    recipe = Recipe(Source(str(text_files)), tokenizer=str(data_folder / "tokenizer"), shard_tokens=3_000)
    prepare(recipe, tmp_path / "other")
    flags = ["--data", str(data_folder), str(tmp_path / "other"), "--data_weights", *weights, "--sequence_length", "32"]
    config = parse_config(flags)
    batches = load_data(config).batches(config, "val")
    count = validation_sequences(batches, 10**6)
    ends = [(20_011 - 1) // 32, (3_000 - 1) // 32]
    fits = [all(u <= e for u, e in zip(batches.mixture.consumed(n), ends, strict=True)) for n in (count, count + 1)]
    assert fits == [True, False]
    assert validation_sequences(batches, 640) == 20


def test_what_is_wrong_with_the_evaluations():
    text = problems("--hellaswag_data", "no/such.jsonl")
    assert "hellaswag_data='no/such.jsonl': no such file; leave it out to download it" in text
    assert "hellaswag_limit='0' should be greater than or equal to 1" in problems("--hellaswag_limit", "0")
    with pytest.raises(UserError, match="lm_eval_limit=1 leaves some of 2 processes without an item"):
        load_config(["--lm_eval_every", "5", "--lm_eval_limit", "1"], 2)


@pytest.mark.parametrize(
    ("in_file", "flags", "folder", "name"),
    [
        ("output_dir: x/y\n", ["--run_name", "c"], "runs/c", "c"),
        ("run_name: b\n", ["--output_dir", "x/y"], "x/y", "y"),
        ("run_name: b\n", [], "runs/b", "b"),
        ("", [], "runs/quickstart", "quickstart"),
    ],
)
def test_the_folder_of_a_run(tmp_path, in_file, flags, folder, name):
    (tmp_path / "a.yaml").write_text(in_file)
    config = parse_config([str(tmp_path / "a.yaml"), *flags])
    assert (str(config.run_folder), config.run_name) == (folder, name)
