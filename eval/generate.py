"""Continue a text with a trained model.

python -m eval.generate runs/quickstart/checkpoints/step_00000800 --prompt "def main("
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.cli import ArgumentParser, UserError, run
from eval.models import load_model
from modeling import GPTModel


@contextmanager
def isolated_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a generator of one's own: seeded inside, and outside as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate(
    model: GPTModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
    streamer: Any = None,
) -> str:
    """The continuation of `prompt` (not the prompt itself), sampled with a generator of its own.

    The prompt stands at the start of a document. A long one is cut from its left until `max_new_tokens`, or half of the
    context, fit in behind it; the continuation ends where the context does. Temperature 0 takes the likeliest token.
    """
    was_training = model.training
    model.eval()
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]]
    context = model.config.n_positions
    ids = ids[-(context - min(max_new_tokens, context // 2)) :]
    max_new_tokens = min(max_new_tokens, context - len(ids))
    input_ids = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    with isolated_random_state(seed, model.device):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    model.train(was_training)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    from transformers import TextStreamer

    parser = ArgumentParser(prog="python -m eval.generate", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("prompt", default="", help="text to continue; without one, a new document")
    parser.add_option("max_new_tokens", type=int, default=200, help="tokens to add, fewer if the text ends before")
    parser.add_option("temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_option("top_k", type=int, default=50, help="sample from so many likeliest tokens; 0 for all")
    parser.add_option("seed", type=int, default=0, help="another seed, another text")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 1:
        raise UserError("temperature and top_k must be at least 0, max_new_tokens at least 1")
    model, tokenizer = load_model(args.model)
    print(args.prompt, end="", flush=True)
    generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


if __name__ == "__main__":
    run(main)
