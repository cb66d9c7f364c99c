"""Loss, perplexity and bits per byte of a model on a data folder or a text file.

python -m eval.loss runs/quickstart/checkpoints/step_00001000 --data data/quickstart
python -m eval.loss gpt2 --data some.txt --stride 512
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import read_text
from data_prep.common.hub import local_folder

if TYPE_CHECKING:
    from torch import Tensor


def summed_loss(
    model: Any, batches: Iterable[dict[str, Tensor]], before_batch: Callable[[], object] | None = None
) -> tuple[float, int]:
    """Returns the summed cross entropy in nats and the number of labels that are not -100.

    Args:
        batches: arguments of the model, `[B, T]` each, among them `shift_labels`.
        before_batch: called before each of them.
    """
    import torch

    from eval.common.models import evaluating
    from modeling.loss import IGNORE_INDEX

    nats, count = [], 0
    with evaluating(model):
        for batch in batches:
            if before_batch is not None:
                before_batch()
            count += int((batch["shift_labels"] != IGNORE_INDEX).sum())
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            nats.append(model.token_losses(**batch).sum())
    return math.fsum(torch.stack(nats).tolist()) if nats else 0.0, count


def read_tokens(data: Path, tokenizer: Any) -> tuple[Tensor, int | None]:
    """Reads the validation tokens of a data folder, or tokenizes a text file: `[N]` int64, starting with end of text.
    Also returns their text's size in bytes, or None if it is unknown.

    Raises:
        UserError: for unreadable data and for data of another tokenizer.
    """
    import numpy as np
    import torch

    from data_prep.sharding.manifest import Manifest
    from data_prep.sharding.shards import open_shard
    from data_prep.tokenization.byte_level import bytes_of_tokens
    from data_prep.tokenization.tokenizer import encode_document, hf_tokenizer

    if not data.is_dir():
        text = read_text(data)
        return torch.tensor(encode_document(tokenizer, text)), len(text.encode("utf-8"))
    manifest: Any = Manifest.read(data)
    if hf_tokenizer(data / "tokenizer").get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{data} was written with another tokenizer ({manifest.tokenizer.name}) than the model's")
    files = [data / shard.file for shard in manifest.shards if shard.split == "val"]
    tokens = np.concatenate([np.array(open_shard(file)) for file in files])  # copied, as a map is an open file
    if int(tokens.max()) >= manifest.tokenizer.vocab_size:
        raise UserError(f"{data}: id {int(tokens.max())} is beyond the vocabulary; run python -m data_prep.verify")
    sizes = bytes_of_tokens(tokenizer)
    text_bytes = manifest.text_bytes("val") if sizes is None else int(sizes[tokens[1:]].sum())
    return torch.from_numpy(tokens.astype(np.int64)), text_bytes


def windows(tokens: Tensor, length: int, stride: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields batches of sliding windows in which every token of `tokens` `[N]` but the first is a label exactly once.

    Windows have `length` tokens and start `stride` tokens apart. With `stride` equal to `length` they are those of the
    rolling log-likelihood of EleutherAI's harness. With a smaller stride each label after the first window has at least
    `length - stride` tokens of context.
    """
    import torch

    from modeling.loss import IGNORE_INDEX

    last = len(tokens) - 1
    ends = [min(length, last)]
    while ends[-1] < last:
        ends.append(min(ends[-1] + stride, last))
    for first in range(0, len(ends), batch_size):
        stops = torch.tensor(ends[first : first + batch_size])[:, None]
        indices = stops - ends[0] + torch.arange(ends[0])
        predicted = torch.tensor([0, *ends])[first : first + len(stops), None]
        labels = tokens[indices + 1].where(indices >= predicted, IGNORE_INDEX)
        yield {"input_ids": tokens[indices], "shift_labels": labels}


def language_modeling_scores(nats: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Returns `loss` in nats per token, `perplexity` and `bits_per_byte` of a summed cross entropy in `nats`.

    Only bits per byte compare between tokenizers. A score is NaN if its number of tokens or bytes is 0.
    """
    loss = nats / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(nats, text_bytes)}


def perplexity(loss: float) -> float:
    """Returns the perplexity per token of a loss in nats per token."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Returns the cross entropy in bits per byte of text; NaN for 0 bytes."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan


def main() -> None:
    parser = ArgumentParser("python -m eval.loss", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("data", type=local_folder, required=True, help="data folder (its validation split) or text file")
    parser.add_option("length", type=int, help="tokens in a window; by default n_positions of the model")
    parser.add_option("stride", type=int, help="tokens between the starts of windows; by default their length")
    parser.add_option("batch_size", type=int, default=8, help="windows in a forward pass")
    args = parser.parse_args()
    from eval.common.models import load_model

    model, tokenizer = load_model(args.model)
    length = model.config.n_positions if args.length is None else args.length
    stride = length if args.stride is None else args.stride
    if args.batch_size < 1:
        raise UserError(f"batch_size={args.batch_size} must be at least 1")
    if not 1 <= length <= model.config.n_positions:
        raise UserError(f"length={length}: a window has between 1 and n_positions={model.config.n_positions} tokens")
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must lie between 1 and the length of a window, {length}")
    tokens, text_bytes = read_tokens(args.data, tokenizer)
    if len(tokens) < 2:
        raise UserError(f"{args.data}: no text in it")
    nats, count = summed_loss(model, windows(tokens, length, stride, args.batch_size))
    scores = language_modeling_scores(nats, count, text_bytes or 0)
    bits = f"{scores['bits_per_byte']:.4f} bits per byte" if text_bytes else "bits per byte not available"
    print(
        f"loss {scores['loss']:.4f} nats per token, perplexity {scores['perplexity']:.2f}, "
        f"{bits} ({count:,} tokens, windows of {length}" + (f" every {stride})" if stride < length else ")")
    )


if __name__ == "__main__":
    run(main)
