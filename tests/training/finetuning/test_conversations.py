"""Conversations: what is read, what is refused, what fits, and which tokens are learned."""

import importlib
import inspect
import json
import re

import pyarrow
import pytest
import torch
from chats import TALK, base_model
from jinja2 import TemplateError
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.common.command_line import UserError
from data_prep.sources.builtin import docstring_conversations
from data_prep.sources.opening import open_source
from data_prep.sources.source import ConversationSource
from modeling.import_checkpoint import write_folder
from training.chat import check_conversations
from training.finetuning import add_chat_template, render, show


@pytest.fixture
def chat_model(data_folder):
    model, tokenizer = base_model(data_folder)
    add_chat_template(model, tokenizer)
    return model, tokenizer


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return ConversationSource(str(path), text_column="messages")


def test_learned_are_the_answers_with_their_end_and_nothing_else(chat_model):
    _, tokenizer = chat_model
    pieces = [(False, "<|endoftext|>")]
    for message in TALK:
        pieces.append((False, f"<|im_start|>{message['role']}\n"))
        answers = message["role"] == "assistant"
        pieces += [(answers, message["content"]), (answers, "<|im_end|>"), (False, "\n")]
    # A special token splits the text before and after it; the newline after a role begins no longer token.
    expected = [
        (number, learned) for learned, text in pieces for number in tokenizer(text, add_special_tokens=False).input_ids
    ]
    rendered = render(tokenizer, TALK)
    assert rendered == expected
    shown = show(tokenizer, rendered, color=False)
    assert shown.startswith("<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n") and "[<|im_end|>]" in shown


def test_the_template_is_that_of_a_plain_loop(chat_model):
    _, tokenizer = chat_model
    turns = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in TALK)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == f"<|endoftext|>{turns}"
    begun = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert begun.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_template_takes_what_clients_of_openai_send(chat_model):
    """Content in parts, none beside a call of a tool, developers, and roles that were not learned."""
    _, tokenizer = chat_model
    parts = [{"type": "text", "text": " a "}, {"type": "input_text", "text": "\nb"}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": parts[:1]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "tool", "content": []},
        {"role": "assistant", "content": parts},
    ]
    texts = ["system\n a \nb", "user\n a ", "assistant\n", "assistant\n", "tool\n", "assistant\n a \nb"]
    expected = "<|endoftext|>" + "".join(f"<|im_start|>{text}<|im_end|>\n" for text in texts)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    learned = [number for number, counts in render(tokenizer, messages) if counts]
    assert tokenizer.decode(learned) == "<|im_end|><|im_end|> a \nb<|im_end|>"
    with pytest.raises(TemplateError, match="a part of the content is image_url; this model reads text alone"):
        tokenizer.apply_chat_template([{"role": "user", "content": [*parts, {"type": "image_url"}]}], tokenize=False)


def test_a_base_model_grows_by_two_tokens_and_stays_what_it_was(data_folder, tmp_path):
    model, tokenizer = base_model(data_folder)
    ids = torch.arange(20)[None]
    before, size = model(ids).logits, model.config.vocab_size
    add_chat_template(model, tokenizer)
    assert model.config.vocab_size == size + 2
    torch.testing.assert_close(model(ids).logits[..., :size], before, rtol=0, atol=0)
    write_folder(model, tokenizer, tmp_path / "chat")
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]
    stock, again = (kind.from_pretrained(tmp_path / "chat") for kind in (AutoModelForCausalLM, AutoTokenizer))
    torch.testing.assert_close(stock.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert render(again, TALK) == render(tokenizer, TALK)
    assert stock.generation_config.eos_token_id == [size + 1, again.bos_token_id]
    assert (again.eos_token, again.pad_token, again.bos_token) == ("<|im_end|>", "<|im_end|>", "<|endoftext|>")
    add_chat_template(stock, again)  # a chat model is trained further as it is
    assert stock.config.vocab_size == size + 2


def test_tokenizers_that_cannot_be_given_a_template(data_folder):
    model, tokenizer = base_model(data_folder)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the model's tokenizer has no end-of-text token"):
        add_chat_template(model, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="marks, which tell what is learned"):
        add_chat_template(model, tokenizer)


def test_conversations_are_read_from_files_of_several_formats(tmp_path):
    records = [{"messages": TALK, "source": "x"}, {"messages": TALK[1:], "source": "y"}]
    write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        source = ConversationSource(str(tmp_path / name), text_column="messages")
        assert list(open_source(source).documents()) == [TALK, TALK[1:]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"a.jsonl, line 2: no field 'messages' among \['text'\]; name one with --messages_column"),
        ({"messages": "x"}, r"line 2: field 'messages' is not a list of messages but str"),
        ({"messages": []}, r"line 2: field 'messages' has no message of the assistant"),
        ({"messages": TALK[:2]}, r"no message of the assistant, .*; its roles are \['system', 'user'\]"),
        ({"messages": ["x"]}, r"message 1 of field 'messages' has no role and content; it is 'x'"),
        ({"messages": [{"role": "user"}]}, r"message 1 of field 'messages' has no role and content"),
        ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, r"message 6 .* has the unknown role 'tool'; the"),
        ({"messages": [*TALK, {"role": [], "content": "x"}]}, r"message 6 .* has the unknown role \[\]"),
        ({"messages": [*TALK, {"role": "user", "content": " \n"}]}, r"message 6 of .*, the user's, is empty"),
        ({"messages": [*TALK, {"role": "user", "content": None}]}, r"content of message 6 .* is not text but NoneType"),
        ({"messages": [*TALK, {"role": "user", "content": "\ud800"}]}, r"the content of message 6 .* is not text"),
        ({"messages": [*TALK, TALK[0]]}, r"message 6 of field 'messages' is the system's, which must be the first"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_record(record, message, tmp_path):
    source = write(tmp_path / "a.jsonl", {"messages": TALK}, record)
    with pytest.raises(UserError, match=message) as error:
        list(open_source(source).documents())
    assert "a.jsonl, line 2" in str(error.value) and "\n" not in str(error.value)


def test_plain_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="plain text has no columns"):
        list(open_source(ConversationSource(str(tmp_path / "a.txt"), text_column="messages")).documents())


def test_conversations_without_an_answer_in_the_context_are_left_out(chat_model):
    _, tokenizer = chat_model
    context = len(render(tokenizer, TALK[:3]))
    long_question = [{"role": "user", "content": "long " * context}, TALK[2]]
    assert check_conversations([TALK[:3], long_question, TALK], tokenizer, context) == ([TALK[:3], TALK], 2)
    with pytest.raises(UserError, match="none of 1 conversations has an answer in its first 5 tokens; give others"):
        check_conversations([TALK], tokenizer, 5)
    with pytest.raises(UserError, match="none of 0 conversations"):
        check_conversations([], tokenizer, 5)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        bad = [{"role": "user", "content": f"a{token}b"}, TALK[2]]
        with pytest.raises(UserError, match=rf"conversation 2 contains '{re.escape(token)}', a special token"):
            check_conversations([TALK, bad], tokenizer, 100)


def test_built_in_answers_are_the_docstrings_of_python():
    talks = docstring_conversations()
    assert len(talks) == 800
    checked = 0
    for question, answer, *_ in talks:
        if found := re.search(r"\b(csv|json|shutil|statistics|textwrap)\.(\w+) do\?", question["content"]):
            thing = getattr(importlib.import_module(found[1]), found[2])
            assert " ".join(inspect.getdoc(thing).split()).startswith(answer["content"])
            checked += 1
    assert checked > 5
