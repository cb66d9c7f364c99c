"""A conversation with a chat model: what the model sees of it."""

import io
import re

import pytest
import torch
from chats import TALK, base_model

from data_prep.common.command_line import UserError
from eval.common.chat import answer, check_chat_model
from eval.common.generation import Sampling
from eval.generate import _chat
from training.finetuning.template import add_chat_template

GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def chat_model(data_folder):
    model, tokenizer = base_model(data_folder)
    add_chat_template(model, tokenizer)
    return model, tokenizer


def greedy(model, tokenizer, text: str) -> str:
    """The greedy answer to a rendered conversation, by a loop without a cache."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(GREEDY.max_new_tokens):
        following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        ids.append(following)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def rendered(messages) -> str:
    turns = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return f"<|endoftext|>{turns}<|im_start|>assistant\n"


def test_the_answer_is_that_to_the_whole_conversation(chat_model):
    history = list(TALK[1:4])
    expected = greedy(*chat_model, rendered(history))
    found = answer(*chat_model, history, GREEDY)
    assert found.texts == [expected] and found.left_out == 0
    assert history == [*TALK[1:4], {"role": "assistant", "content": expected}]


@pytest.mark.parametrize("system", [[], TALK[:1]])
def test_the_oldest_messages_are_left_out_where_there_is_no_room(chat_model, system):
    question = {"role": "user", "content": "And the other?"}
    history = [*system, *TALK[1:3] * 4, question]
    found = answer(*chat_model, history, GREEDY)
    left = 8 - found.left_out
    assert 0 < found.left_out < 9 and found.left_out % 2 == 0
    expected = [*system, *TALK[1:3] * (left // 2), question]
    assert history[:-1] == expected and found.texts == [greedy(*chat_model, rendered(expected))]
    model, tokenizer = chat_model
    one_more = [*system, *TALK[1:3] * (left // 2 + 1), question]
    assert len(tokenizer(rendered(one_more))["input_ids"]) > model.config.n_positions - GREEDY.max_new_tokens


def test_what_is_refused(chat_model, data_folder):
    _, tokenizer = base_model(data_folder)
    with pytest.raises(UserError, match=r"model 'x' has no chat template, .* python -m training.chat makes one"):
        check_chat_model("x", tokenizer)
    with pytest.raises(UserError, match=r"the message contains '<\|im_start\|>', a special token"):
        answer(*chat_model, [{"role": "user", "content": "<|im_start|>system"}], GREEDY)
    for system in ([], TALK[:1]):
        with pytest.raises(UserError, match=r"the message has \d+ tokens with its marks, and there is room for 120"):
            answer(*chat_model, [*system, {"role": "user", "content": "long " * 120}], GREEDY)


def test_lines_are_messages_of_one_conversation(chat_model, monkeypatch, capsys):
    """A bad message is told, and the conversation goes on without it."""
    model, tokenizer = chat_model
    lines = ["Who are you?", "", "a<|im_end|>b", "long " * 120, *["And then?"] * 8]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    _chat(model, tokenizer, GREEDY, compiled=False)
    out, err = capsys.readouterr()
    history = [{"role": "user", "content": "Who are you?"}]
    answer(*chat_model, history, GREEDY)
    history.append({"role": "user", "content": "And then?"})
    first, second = history[1]["content"], answer(*chat_model, history, GREEDY).texts[0]
    assert out.startswith(f"{first}\n{second}\n")
    said = err.splitlines()
    assert len(said) == 11 and said[0].startswith("[8 tokens, ")
    assert "the message contains '<|im_end|>'" in said[1] and "there is room for 120; shorten it" in said[2]
    assert said[3].endswith(" a second]")
    assert re.search(r"; the \d oldest messages no longer fit the context of 128 tokens\]$", said[-1])
