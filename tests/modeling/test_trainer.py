"""HF's `Trainer` and other libraries' loaders and savers, with `GPTModel` and stock GPT-2 in each other's place."""

import shutil

import pytest
import safetensors.torch
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from small_models import SMALL, as_ours, random_stock_model, tokens
from torch.func import functional_call
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from modeling import GPTConfig, GPTModel


def _trainer(model, folder, **settings) -> Trainer:
    """`Trainer` of six examples, validated on two of them."""
    examples = [{"input_ids": row, "labels": row} for row in tokens(6, 16)]
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:2],
        compute_metrics=lambda predicted: {"shape": len(predicted.predictions.shape)},
    )


def _losses(trainer: Trainer) -> dict[tuple[str, int], float]:
    names = ("loss", "eval_loss", "eval_shape")
    return {(name, line["step"]): line[name] for line in trainer.state.log_history for name in names if name in line}


def test_trainer_trains_evaluates_resumes_and_loads_the_best(tmp_path):
    stock = random_stock_model()
    ours = as_ours(stock, tmp_path / "model")
    losses = []
    for model, name in ((stock, "stock"), (ours, "ours")):
        trainer = _trainer(model, tmp_path / name, load_best_model_at_end=True)
        trainer.train()
        losses.append(_losses(trainer))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and ("eval_loss", 4) in losses[1]
    best = GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(ours(tokens(2, 9)).logits, best(tokens(2, 9)).logits, atol=1e-5, rtol=0)

    shutil.rmtree(tmp_path / "ours" / "checkpoint-4")
    again = _trainer(GPTModel(GPTConfig(**SMALL)), tmp_path / "ours")
    again.train(resume_from_checkpoint=True)
    assert _losses(again) == pytest.approx(losses[1], abs=1e-6)


def _save_model(model, folder):
    Accelerator(cpu=True).save_model(model, folder)


SAVERS = {
    "accelerate": _save_model,
    "accelerate_sharded": lambda model, folder: Accelerator(cpu=True).save_model(model, folder, max_shard_size="40KB"),
    "safetensors": lambda model, folder: safetensors.torch.save_model(model, folder / "model.safetensors"),
    "torch": lambda model, folder: torch.save(model.state_dict(), folder / "pytorch_model.bin"),
    "given": lambda model, folder: model.save_pretrained(folder, state_dict=model.state_dict()),
    "given_parameters": lambda model, folder: model.save_pretrained(folder, state_dict=dict(model.named_parameters())),
    "as_in_memory": lambda model, folder: model.save_pretrained(folder, save_original_format=False),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS.keys())
def test_what_others_save_loads_in_both_classes(save, tmp_path):
    ours = as_ours(random_stock_model(), tmp_path / "first")
    (tmp_path / "saved").mkdir()
    ours.config.save_pretrained(tmp_path / "saved")
    save(ours, tmp_path / "saved")
    for cls in (GPTModel, GPT2LMHeadModel):
        again, report = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        torch.testing.assert_close(again.eval()(tokens(2, 9)).logits, ours(tokens(2, 9)).logits, atol=1e-5, rtol=0)


LOADERS = {
    "load_state_dict": lambda model, file: model.load_state_dict(safetensors.torch.load_file(file), strict=False),
    "assign": lambda model, file: model.load_state_dict(safetensors.torch.load_file(file), strict=False, assign=True),
    "safetensors": safetensors.torch.load_model,
    "accelerate": load_checkpoint_in_model,
    "backbone": lambda model, file: model.transformer.load_state_dict(
        {name.removeprefix("transformer."): tensor for name, tensor in safetensors.torch.load_file(file).items()}
    ),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_others_load_what_stock_saves(load, tmp_path):
    stock = random_stock_model()
    stock.save_pretrained(tmp_path)
    ours = GPTModel(GPTConfig(**SMALL)).eval()
    load(ours, str(tmp_path / "model.safetensors"))
    ours.tie_weights()
    torch.testing.assert_close(ours(tokens(2, 9)).logits, stock(tokens(2, 9)).logits, atol=1e-5, rtol=0)
    assert all(parameter.is_contiguous() for parameter in ours.parameters())


def _dispatch(model, file):
    return load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"})


OFFLOADERS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder / "offloaded", execution_device="cpu"),
    "dispatch": lambda model, folder: _dispatch(model, str(folder / "model.safetensors")),
    "functional": lambda model, folder: lambda ids: functional_call(model, dict(model.named_parameters()), (ids,)),
}


@pytest.mark.parametrize("offload", OFFLOADERS.values(), ids=OFFLOADERS.keys())
def test_what_takes_a_state_dict_for_the_parameters_works(offload, tmp_path):
    stock = random_stock_model()
    ours = as_ours(stock, tmp_path)
    model = offload(ours, tmp_path) or ours
    torch.testing.assert_close(model(tokens(2, 9)).logits, stock(tokens(2, 9)).logits, atol=1e-5, rtol=0)
