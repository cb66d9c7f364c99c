"""Questions scored as trees against each ending behind its context, alone and on stock GPT-2."""

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_prep.common.command_line import UserError
from eval.common.devices import make_accelerator
from eval.common.multiple_choice import Question, accuracy, count_truncated, score
from modeling import GPTConfig, GPTModel

N_POSITIONS, VOCAB_SIZE = 24, 70


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_embd=32, n_head=2, n_positions=N_POSITIONS, vocab_size=VOCAB_SIZE, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTModel(config)


def questions(count, seed=0, longest_context=30):
    """Contexts of one token and of more than the model's; endings that fill its context, and some that are alike."""
    draw = random.Random(seed)

    def tokens(length):
        return [draw.randrange(VOCAB_SIZE) for _ in range(length)]

    made = [
        Question(tokens(draw.randint(1, longest_context)), [tokens(draw.randint(1, 12)) for _ in range(4)])
        for _ in range(count)
    ]
    same = tokens(5)
    return [
        *made,
        Question(tokens(1), [same, same, tokens(N_POSITIONS)]),
        Question(tokens(N_POSITIONS), [same, same[:1]]),
    ]


def alone(model, questions, tmp_path):
    """Each ending by itself on stock GPT-2, the context cut from the left until both fit."""
    model.save_pretrained(tmp_path / "model")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    for question in questions:
        costs = []
        for ending in question.endings:
            tokens = torch.tensor((question.context + ending)[-(N_POSITIONS + 1) :])
            with torch.no_grad():
                logits = stock(tokens[None, :-1]).logits[0, -len(ending) :]
            costs.append(F.cross_entropy(logits, tokens[-len(ending) :], reduction="sum").item())
        yield costs


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_ending_costs_what_it_costs_alone(model, tmp_path, batch_size, compiled):
    asked = questions(20)
    expected = list(alone(model, asked, tmp_path))
    if compiled:
        for block in model.transformer.h:
            block.compile(backend="eager")
    found = score(make_accelerator(), model, asked, batch_size)
    assert [len(costs) for costs in found] == [len(question.endings) for question in asked]
    for costs, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(costs), torch.tensor(reference), atol=2e-5, rtol=0)


def test_a_compiled_model_is_not_compiled_for_each_length(model):
    def backend(graph, inputs):
        raise AssertionError(f"compiled for {[tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)]}")

    for block in model.transformer.h:
        block.compile(backend=backend)
    score(make_accelerator(), model, questions(7), 4)


def test_the_model_is_left_as_it_was(model):
    """In training mode, with its own attention, which may be one that takes no masks."""

    def maskless(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError("a kernel without masks was given trees")

    ALL_ATTENTION_FUNCTIONS.register("maskless", maskless)
    model.config._attn_implementation = "maskless"
    model.train()
    state = torch.get_rng_state()
    score(make_accelerator(), model, questions(3), 2)
    assert model.training and model.config._attn_implementation == "maskless"
    assert torch.equal(torch.get_rng_state(), state)


def test_truncated_contexts_are_counted():
    assert count_truncated([Question([1] * 20, [[1] * 5, [1]]), Question([1] * 21, [[1], [1] * 5])], N_POSITIONS) == 1


def test_an_ending_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match="an ending of 25 tokens exceeds the model's context of 24"):
        score(make_accelerator(), model, [Question([1], [[1], [2] * 25])], 1)


def test_accuracy_takes_the_first_of_equals_and_divides_by_length():
    nats = [[3.0, 2.0, 2.0], [1.0, 6.0], [4.0, 3.0]]
    assert accuracy(nats, [1, 0, 0], None) == pytest.approx(2 / 3)
    assert accuracy(nats, [2, 1, 0], [[1, 2, 4], [1, 7], [4, 3]]) == 1.0
