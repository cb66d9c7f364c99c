"""Make a base model answer: train it on conversations, with a chat template that its folder then has.

python -m training.chat runs/quickstart/checkpoints/step_00001000 --data builtin --num_train_epochs 20
python -m training.chat runs/mine/checkpoints/step_00019073 --max_train_samples 100000 --output_dir runs/mine-chat

Needs the extra `chat`: pip install -e ".[chat]" -c constraints.txt
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import torch
from safetensors import SafetensorError

from data_prep.common.command_line import ArgumentParser, UserError, first_line, raise_all, run
from data_prep.common.files import write_text
from data_prep.common.schema import read_json
from data_prep.reading.sources import ConversationSource
from eval.common.launch import on_cpu, processes_launched
from eval.common.models import load_model
from training.finetuning.conversations import fit, read_conversations, split
from training.finetuning.template import add_chat_template, render, show
from training.finetuning.trainer import FinetuningSettings, finetune

DEFAULT_DATA = "HuggingFaceTB/smol-smoltalk"
_SETTINGS = "settings.json"  # in the folder of an unfinished training


def default_output(model: str) -> Path:
    """`runs/NAME-chat`, with the name of the run or of the model."""
    path = Path(model)
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    return Path("runs") / f"{name}-chat"


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes an HF GPT-2 folder with its tokenizer and chat template, completely or not at all (`UserError` if the disk
    is full)."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        written = Path(partial) / folder.name
        try:
            model.save_pretrained(written)
        except SafetensorError as error:
            raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error
        tokenizer.save_pretrained(written)
        written.rename(folder)


def _unfinished(output: Path) -> Path:
    """The folder of a training that has not ended yet: the same command continues it."""
    return output.with_name(f".{output.name}.training")


def _identity(args: Any) -> dict[str, Any]:
    """The settings that a training is continued with only if they are the same."""
    return {name: value for name, value in vars(args).items() if name != "output_dir"}


def _parse() -> Any:
    parser = ArgumentParser("python -m training.chat", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option(
        "data",
        default=DEFAULT_DATA,
        help="conversations: a data set of the Hub, a file or folder of what data_prep reads, or 'builtin', about "
        "Python's standard library, without a network",
    )
    parser.add_option("name", help="configuration of the Hub data set")
    parser.add_option("split", default="train", help="split of the Hub data set")
    parser.add_option("revision", help="branch, tag or commit of the Hub data set")
    parser.add_option("messages_column", default="messages", help="field with a list of messages: role and content")
    parser.add_option("max_train_samples", type=int, help="conversations to learn from, the first ones; all by default")
    parser.add_option("max_eval_samples", type=int, default=100, help="conversations that are held out to measure on")
    parser.add_option("max_length", type=int, help="tokens of a row; the model's context by default")
    parser.add_fields(FinetuningSettings)
    parser.add_option("output_dir", type=Path, help="the new model's folder; runs/NAME-chat by default")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    settings = FinetuningSettings(**{field.name: getattr(args, field.name) for field in fields(FinetuningSettings)})
    output = args.output_dir or default_output(args.model)
    _check(args, settings, output)

    model, tokenizer = load_model(args.model, torch.device("cpu"))
    max_length = args.max_length or model.config.n_positions
    if max_length > model.config.n_positions:
        raise UserError(f"max_length={max_length} is more than the model's context of {model.config.n_positions}")
    new_tokens = add_chat_template(model, tokenizer)
    source = ConversationSource(
        args.data, name=args.name, split=args.split, revision=args.revision, text_column=args.messages_column
    )
    limit = args.max_train_samples and args.max_train_samples + args.max_eval_samples
    try:
        fitted = fit(read_conversations(source), tokenizer, max_length, limit)
    except UserError as error:
        hint = " (--data builtin needs no network)" if args.data == DEFAULT_DATA else ""
        raise UserError(f"{error}{hint}") from error
    train, held_out = split(fitted.conversations, args.max_eval_samples, settings.seed)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        if line := fitted.describe(max_length):
            print(line)
        print(f"{len(train):,} conversations to learn from, {len(held_out):,} held out; of the first, this is learned:")
        print(show(tokenizer, render(tokenizer, train[0]), sys.stdout.isatty()), flush=True)
        _unfinished(output).mkdir(exist_ok=True)
        write_text(_unfinished(output) / _SETTINGS, json.dumps(_identity(args)) + "\n")
    states = _unfinished(output) / "state"
    model, losses = finetune(model, tokenizer, new_tokens, train, held_out, max_length, settings, states)
    if not is_first:
        return
    save(model, tokenizer, output)
    shutil.rmtree(_unfinished(output))
    best, last = min(losses, key=losses.__getitem__), max(losses)
    print(
        f"held-out loss {losses[0]:.4f} before, {losses[last]:.4f} after step {last:,}, lowest after step {best:,}; in "
        f"nats per token of the assistant"
    )
    print(f"chat model  {output}\ntalk to it  python -m eval.generate {shlex.quote(str(output))} --chat")


def _check(args: Any, settings: FinetuningSettings, output: Path) -> None:
    """Refuses settings out of bounds, missing packages, and an output that cannot be written (`UserError`)."""
    problems = settings.problems()
    for name, least in (("max_train_samples", 1), ("max_eval_samples", 1), ("max_length", 2)):
        if (value := getattr(args, name)) is not None and value < least:
            problems.append(f"{name}={value} must be at least {least}")
    if processes_launched() == 1 and not on_cpu() and torch.cuda.device_count() > 1:
        gpus = f"{torch.cuda.device_count()} GPUs and one process"
        problems.append(f"{gpus}; start by accelerate launch -m training.chat, or set CUDA_VISIBLE_DEVICES=0")
    if os.path.lexists(output):
        problems.append(f"output_dir={output} exists; give another, or remove it")
    elif (begun := _unfinished(output) / _SETTINGS).exists() and read_json(begun, dict[str, Any]) != _identity(args):
        unfinished = f"{begun.parent} has an unfinished training with other settings"
        problems.append(f"{unfinished}; remove it, or give another output_dir")
    packages = ["trl", *(["peft"] if settings.lora_r else [])]
    if missing := [name for name in packages if find_spec(name) is None]:
        problems.append(f"{' and '.join(missing)} is not installed; pip install -e '.[chat]' -c constraints.txt")
    raise_all(problems)
    try:  # now, not after the training
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=output.parent).cleanup()
    except OSError as error:
        raise UserError(f"output_dir={output} cannot be written ({error.strerror}); give another") from error


if __name__ == "__main__":
    run(main)
