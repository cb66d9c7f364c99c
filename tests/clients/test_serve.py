"""A checkpoint behind `transformers serve`, base and chat: the greedy tokens of `generate()`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from chats import TALK, base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling.import_checkpoint import write_folder
from training.finetuning import add_chat_template

pytestmark = pytest.mark.clients
pytest.importorskip("fastapi")


@contextmanager
def served(folder: Path):
    """Starts the server as docs/chat.md does; yields a function that posts to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    options = {"env": os.environ | {"HF_HUB_OFFLINE": "1"}, "text": True}
    with subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, **options) as server:
        try:
            lines = []
            while "running on" not in (line := server.stderr.readline()):
                lines.append(line)
                assert server.poll() is None, "".join(lines)

            def post(path: str, **body) -> dict:
                data = json.dumps({"model": str(folder), "temperature": 0, "max_tokens": 8} | body).encode()
                request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
                request.add_header("Content-Type", "application/json")
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.load(answer)["choices"][0]

            yield post
        finally:
            server.kill()
            server.communicate()  # a full pipe would stop it


def greedy(folder: Path, ids: list[int]) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_a_base_model_completes(tiny_run):
    (folder,) = tiny_run.checkpoints[-1:]
    expected = greedy(folder, AutoTokenizer.from_pretrained(folder)("import os")["input_ids"])
    with served(folder) as post:
        found = post("/v1/completions", prompt="import os")
        assert (found["text"], found["finish_reason"]) == (expected, "length")


def test_a_chat_model_answers(data_folder, tmp_path):
    assert shutil.which("transformers", path=str(Path(sys.executable).parent))
    model, tokenizer = base_model(data_folder)
    add_chat_template(model, tokenizer)
    write_folder(model, tokenizer, tmp_path / "chat")
    ids = tokenizer.apply_chat_template(TALK[1:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = greedy(tmp_path / "chat", ids)
    with served(tmp_path / "chat") as post:
        assert post("/v1/chat/completions", messages=TALK[1:4])["message"]["content"] == expected
        assert post("/v1/chat/completions", messages=TALK[1:2])["message"]["content"] != expected
        parts = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in TALK[1:4]]
        assert post("/v1/chat/completions", messages=parts)["message"]["content"] == expected
        others = [{"role": role, "content": None} for role in ("developer", "assistant", "tool")]
        assert post("/v1/chat/completions", messages=[*others, *TALK[1:2]])["finish_reason"]
