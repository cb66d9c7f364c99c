"""A checkpoint of ours in the hands of those who load GPT-2: each against `GPTModel` on the same weights.

What a client is called with here is what docs/releasing.md shows. lm-eval is in tests/eval/test_harness.py.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import gpt2_tokenizer
from modeling import GPTConfig, GPTModel
from training.export_gguf import write_gguf

pytestmark = pytest.mark.clients
PROMPT, NEW_TOKENS = "import os\n\nclass Test", 12


@pytest.fixture(scope="session")
def checkpoint(train) -> Path:
    """That of a run with a vocabulary of its own, trained until its choices are clear."""
    flags = ["--max_steps", "120", "--save_steps", "120", "--eval_steps", "120", "--n_positions", "64"]
    return train("released", *flags, "--sequence_length", "32", "--order", "shuffled").checkpoints[-1]


@pytest.fixture(scope="session")
def gpt2_checkpoint(tmp_path_factory) -> Path:
    """Random weights with GPT-2's vocabulary, large enough for its choices to be clear."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "n_positions": 64}
    model = GPTModel(GPTConfig(**sizes, bos_token_id=50256, eos_token_id=50256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    folder = tmp_path_factory.mktemp("gpt2") / "checkpoint"
    model.save_pretrained(folder)
    gpt2_tokenizer().save(folder)
    return folder


def ours(folder: Path, prompt: str = PROMPT) -> tuple[list[int], list[int], torch.Tensor]:
    """The ids of the prompt, the greedy ones after it, and the log-probabilities of the first of those `[V]`."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    model = GPTModel.from_pretrained(folder).eval()
    found = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        return ids, found[0, len(ids) :].tolist(), model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_transformers(checkpoint):
    """`pipeline` and `AutoModelForCausalLM`, by the folder's name alone."""
    ids, greedy, _ = ours(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generate = pipeline("text-generation", model=str(checkpoint))
    (found,) = generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False)
    assert found["generated_text"] == tokenizer.decode(greedy)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    mine = GPTModel.from_pretrained(checkpoint).eval()
    tokens = torch.tensor([ids])
    torch.testing.assert_close(stock(tokens).logits, mine(tokens).logits, rtol=0, atol=1e-5)


def test_trl(checkpoint, tmp_path):
    """Fine-tuned by TRL, the loss falls, and the result loads as stock GPT-2 as well."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs = [{"prompt": f"question {i % 4}", "completion": f" answer {i % 4}"} for i in range(32)]
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 6, "learning_rate": 5e-3, "logging_steps": 1}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "max_length": 32, "bf16": False}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model=GPTModel.from_pretrained(checkpoint),
        args=trl.SFTConfig(output_dir=str(tmp_path / "sft"), **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(tmp_path / "tuned")
    tokens = torch.arange(1, 20)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    mine = GPTModel.from_pretrained(tmp_path / "tuned").eval()
    torch.testing.assert_close(stock(tokens).logits, mine(tokens).logits, rtol=0, atol=1e-4)


def test_peft(checkpoint, tmp_path):
    """A LoRA adapter, trained, saved, loaded onto the checkpoint again, and merged into its weights."""
    peft = pytest.importorskip("peft")
    tokens = torch.tensor([[5, 9, 7, 200] * 8])
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"])
    model = GPTModel.from_pretrained(checkpoint)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(80):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    logits = model.eval()(tokens).logits
    again = peft.PeftModel.from_pretrained(GPTModel.from_pretrained(checkpoint), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for reader in (GPTModel, AutoModelForCausalLM):
        found = reader.from_pretrained(tmp_path / "merged").eval()(tokens).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_onnx(checkpoint, tmp_path):
    """Exported by transformers' own exporter, and run by ONNX Runtime at another length than it was exported at."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = GPTModel.from_pretrained(checkpoint).eval()
    model.config.use_cache = False
    sample = {"input_ids": torch.arange(1, 9).reshape(2, 4)}
    program = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True))
    program.save_pretrained(tmp_path / "onnx")
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.arange(1, 37).reshape(3, 12)
    (logits, *_) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    expected = GPTModel.from_pretrained(checkpoint).eval()(tokens).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def run_llama_cpp(file: Path, prompt: str) -> dict:
    """The answer of llama.cpp's server to a prompt that it tokenizes itself."""
    llama = pytest.importorskip("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 64, 1, 0, False
    request = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
    return llama.Server(settings).handle_completions(request)["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("float16", 1e-2)])
def test_gguf(checkpoint, tmp_path, dtype, tolerance):
    """Our exporter: llama.cpp tokenizes, chooses and weighs as we do."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    run_command(sys.executable, "-m", "training.export_gguf", checkpoint, file, "--dtype", dtype, cwd=tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = load_file(checkpoint / "model.safetensors")
    written = torch.tensor(tensors["blk.1.attn_qkv.weight"].data)
    assert torch.equal(written.float(), weights["transformer.h.1.attn.c_attn.weight"].T.to(written.dtype).float())
    agrees_with_llama_cpp(checkpoint, file, tolerance)


def test_gguf_of_what_llama_cpp_does_not_know_is_refused(checkpoint, tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = GPTModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="does not split text as GPT-2's does"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    model.config.activation_function = "gelu"
    with pytest.raises(UserError, match=r"llama\.cpp's GPT-2 is another network .* activation_function=gelu$"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def agrees_with_llama_cpp(folder: Path, file: Path, tolerance: float) -> None:
    _, greedy, logprobs = ours(folder)
    found = run_llama_cpp(file, PROMPT)
    for one in found[0]["top_logprobs"]:
        assert one["logprob"] == pytest.approx(logprobs[one["id"]].item(), abs=tolerance)
    assert [one["id"] for one in found] == greedy


def test_llama_cpp_s_own_converter(gpt2_checkpoint, tmp_path):
    """It takes a checkpoint with GPT-2's vocabulary; what it writes is what our exporter writes."""
    gguf = pytest.importorskip("gguf")
    source = os.environ.get("LLAMA_CPP")
    if source is None:
        pytest.skip("needs the environment variable LLAMA_CPP: a folder with llama.cpp's convert_hf_to_gguf.py")
    theirs, mine = tmp_path / "theirs.gguf", tmp_path / "mine.gguf"
    converter = [sys.executable, Path(source) / "convert_hf_to_gguf.py", gpt2_checkpoint, "--outfile", theirs]
    environment = os.environ | {"PYTHONPATH": str(Path(source) / "gguf-py")}
    run_command(*converter, "--outtype", "f32", cwd=tmp_path, env=environment)
    run_command(sys.executable, "-m", "training.export_gguf", gpt2_checkpoint, mine, cwd=tmp_path)
    left, right = gguf.GGUFReader(theirs), gguf.GGUFReader(mine)
    tensors = [{tensor.name: tensor.data.tobytes() for tensor in reader.tensors} for reader in (left, right)]
    assert tensors[0] == tensors[1]
    own = {"GGUF.kv_count", "general.name", "general.size_label", "general.type", "general.quantization_version",
           "tokenizer.ggml.unknown_token_id"}  # fmt: skip
    for name in left.fields.keys() - own:
        assert left.fields[name].contents() == right.fields[name].contents(), name
    agrees_with_llama_cpp(gpt2_checkpoint, theirs, 2e-3)
    agrees_with_llama_cpp(gpt2_checkpoint, mine, 2e-3)


def test_vllm(gpt2_checkpoint, tmp_path):  # it has no kernel for narrow heads
    pytest.importorskip("vllm")
    _, greedy, _ = ours(gpt2_checkpoint)
    program = (
        "import sys\nfrom vllm import LLM, SamplingParams\nif __name__ == '__main__':\n"
        "    llm = LLM(model=sys.argv[1], dtype='float32', enforce_eager=True)\n"
        "    done = llm.generate([sys.argv[2]], SamplingParams(temperature=0, max_tokens=int(sys.argv[3])))\n"
        "    print('tokens', *done[0].outputs[0].token_ids)\n"
    )
    (tmp_path / "run.py").write_text(program)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    words = [sys.executable, "run.py", gpt2_checkpoint, PROMPT, NEW_TOKENS]
    output = run_command(*words, cwd=tmp_path, env=environment).stdout
    assert f"tokens {' '.join(map(str, greedy))}" in output
