"""Turn a base model into a chat model: fine-tune it on conversations and save a chat template with it.

python -m training.chat runs/quickstart/checkpoints/step_00001000 --data builtin --num_train_epochs 20
python -m training.chat runs/mine/checkpoints/step_00019073 --max_train_samples 100000 --output_dir runs/mine-chat

Needs the extra `chat`: pip install -e ".[chat]" -c constraints.txt
"""

import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_prep.common.command_line import ArgumentParser, UserError, raise_all, run
from data_prep.common.files import write_text
from data_prep.common.schema import find_problems, read_json
from data_prep.sources.opening import open_source
from training.finetuning import FinetuningSettings, add_chat_template, finetune, render, show

DEFAULT_DATA = "HuggingFaceTB/smol-smoltalk"
_SETTINGS = "settings.json"  # in the folder of an unfinished training


def check_conversations(conversations: Iterable[Any], tokenizer: Any, context: int) -> tuple[list[Any], int]:
    """Drops conversations in which no answer starts within the first `context` tokens, where they are truncated.
    Returns the rest, and how many are longer than that.

    Raises:
        UserError: for text that contains a special token of the tokenizer, and if there are no such conversations.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    kept, longer, number = [], 0, 0
    for number, messages in enumerate(conversations, start=1):
        for token, message in itertools.product(special, messages):
            if token in message["content"]:
                raise UserError(f"conversation {number:,} contains {token!r}, a special token; remove it there")
        rendered = render(tokenizer, messages)
        longer += len(rendered) > context
        if any(learned for _, learned in rendered[:context]):
            kept.append(messages)
    if not kept:
        remedy = "give others, or a model with a longer context"
        raise UserError(f"none of {number:,} conversations has an answer in its first {context:,} tokens; {remedy}")
    return kept, longer


def main() -> None:
    args, settings = _parse()
    output = args.output_dir or _default_output(args.model)
    unfinished = output.parent / f".{output.name}.training"  # of a training that the same command continues
    identity = {name: value for name, value in vars(args).items() if name != "output_dir"}
    _check(settings, output, unfinished, identity)

    from torch import device

    from eval.common.models import load_model
    from modeling.import_checkpoint import write_folder

    model, tokenizer = load_model(args.model, device("cpu"))
    add_chat_template(model, tokenizer)
    is_first = os.environ.get("RANK", "0") == "0"
    data = _prepare_data(args, settings, tokenizer, model.config.n_positions, is_first)
    if is_first:
        unfinished.mkdir(exist_ok=True)
        write_text(unfinished / _SETTINGS, json.dumps(identity) + "\n")
    losses = finetune(model, tokenizer, data, settings, unfinished / "state")
    if not is_first:
        return
    try:
        write_folder(model, tokenizer, output)
    except ValueError as error:
        raise UserError(str(error)) from error
    shutil.rmtree(unfinished)
    best, last, name = min(losses, key=losses.__getitem__), max(losses), shlex.quote(str(output))
    print(
        f"held-out loss {losses[0]:.4f} before, {losses[last]:.4f} after step {last:,}, lowest after step {best:,}; in "
        f"nats per token of the assistant\n"
        f"chat model  {output}\n"
        f"talk to it  transformers serve {name}, and in another terminal: transformers chat {name}"
    )


def _parse() -> tuple[Any, FinetuningSettings]:
    parser = ArgumentParser("python -m training.chat", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    help_data = "conversations: a data set of the Hub, a file or folder of what data_prep reads, or 'builtin', about "
    parser.add_option("data", default=DEFAULT_DATA, help=f"{help_data}Python's standard library, without a network")
    parser.add_option("name", help="configuration of the Hub data set")
    parser.add_option("split", default="train", help="split of the Hub data set")
    parser.add_option("revision", help="branch, tag or commit of the Hub data set")
    parser.add_option("messages_column", default="messages", help="field with a list of messages: role and content")
    parser.add_fields(FinetuningSettings)
    parser.add_option("output_dir", type=Path, help="the new model's folder; runs/NAME-chat by default")
    args = parser.parse_args()
    return args, FinetuningSettings(**{field.name: getattr(args, field.name) for field in fields(FinetuningSettings)})


def _default_output(model: str) -> Path:
    """`runs/NAME-chat`, named after the run or the model."""
    path = Path(model)
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    return Path("runs") / f"{name}-chat"


def _read(args: Any) -> Iterable[Any]:
    """Reads the conversations of `--data` (`UserError` naming the record that is invalid)."""
    from data_prep.sources.builtin import docstring_conversations
    from data_prep.sources.source import BUILTIN, ConversationSource

    if args.data == BUILTIN:
        return docstring_conversations()
    source = ConversationSource(
        args.data, name=args.name, split=args.split, revision=args.revision, text_column=args.messages_column
    )
    try:
        return open_source(source).documents()
    except UserError as error:
        hint = " (--data builtin needs no network)" if args.data == DEFAULT_DATA else ""
        raise UserError(f"{error}{hint}") from error


def _prepare_data(
    args: Any, settings: FinetuningSettings, tokenizer: Any, context: int, is_first: bool
) -> dict[str, Any]:
    """Splits the conversations into `train` and a held-out `test`; the first process describes them."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    limit = settings.max_train_samples and settings.max_train_samples + settings.max_eval_samples
    kept, longer = check_conversations(itertools.islice(_read(args), limit), tokenizer, context)
    if len(kept) <= settings.max_eval_samples:
        none_left = f"leaves none of the {len(kept)} conversations to learn from; give fewer, or more data"
        raise UserError(f"max_eval_samples={settings.max_eval_samples} {none_left}")
    rows = Dataset.from_list([{"messages": messages} for messages in kept])
    data = rows.train_test_split(settings.max_eval_samples, seed=settings.seed)
    if is_first:
        if longer:
            print(f"{longer:,} conversations are longer than {context:,} tokens and cut there")
        counts = f"{len(data['train']):,} conversations to learn from, {len(data['test']):,} held out"
        print(f"{counts}; of the first, this is learned:")
        print(show(tokenizer, render(tokenizer, data["train"][0]["messages"]), sys.stdout.isatty()), flush=True)
    return dict(data)


def _check(settings: FinetuningSettings, output: Path, unfinished: Path, identity: dict[str, Any]) -> None:
    """Refuses settings out of bounds, missing packages, and an unwritable output (`UserError`)."""
    problems = [problem for _, problem in find_problems(vars(settings), FinetuningSettings, "")]
    if os.path.lexists(output):
        problems.append(f"output_dir={output} exists; give another, or remove it")
    elif (begun := unfinished / _SETTINGS).exists() and read_json(begun, dict[str, Any]) != identity:
        text = f"{unfinished} has an unfinished training with other settings"
        problems.append(f"{text}; remove it, or give another output_dir")
    if find_spec("trl") is None:
        problems.append("trl is not installed; pip install -e '.[chat]' -c constraints.txt")
    raise_all(problems)
    try:  # now, not after the training
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=output.parent).cleanup()
    except OSError as error:
        raise UserError(f"output_dir={output} cannot be written ({error.strerror}); give another") from error

    import torch

    from eval.common.launch import on_cpu, processes_launched

    if processes_launched() == 1 and not on_cpu() and (gpus := torch.cuda.device_count()) > 1:
        remedy = "start by accelerate launch -m training.chat, or set CUDA_VISIBLE_DEVICES=0"
        raise UserError(f"{gpus} GPUs and one process; {remedy}")


if __name__ == "__main__":
    run(main)
