"""The code that inductor makes for an H100, read without one: traced on the CPU, and moved to CUDA in the graph.

It needs triton, which torch for the CPU comes without: `pip install --no-deps triton==3.7.1`.
"""

import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from modeling import GPTConfig, GPTModel
from modeling.loss import nats_and_gradient

pytest.importorskip("triton")

TOKENS, VOCAB = 16384, 50304
CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
)
DEVICE = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": lambda *_: None,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda._get_device_properties": lambda *_: H100,
    "torch.cuda._lazy_init": lambda: None,
    "torch._C._cuda_getDevice": lambda: 0,
}


def cuda_code(function, *arguments: torch.Tensor) -> str:
    """The code of inductor for a function on an H100."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    with patch("torch.compiler.is_compiling", lambda: True):
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*arguments)
    for node in traced.graph.nodes:
        values = node.meta.get("val")
        for tensor in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(tensor, torch.Tensor):
                tensor.fake_device = CUDA
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    traced.recompile()
    inputs = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    with ExitStack() as stack:
        for name, value in DEVICE.items():
            stack.enter_context(patch(name, value, create=True))
        stack.enter_context(config.patch({"triton.autotune_at_compile_time": False}))
        stack.callback(setattr, driver, "_active", driver._active)
        driver.set_active(target)
        graph = GraphLowering(traced, example_inputs=inputs, shape_env=inputs[0].fake_mode.shape_env)
        stack.enter_context(V.set_graph_handler(graph))
        stack.enter_context(V.set_fake_mode(inputs[0].fake_mode))
        stack.enter_context(DebugContext())
        graph.run(*inputs)
        return graph.codegen()[0].value


def kernels(code: str) -> list[str]:
    return re.findall(r"^def (triton_\w+)\(", code, re.MULTILINE)


def test_the_loss_of_a_chunk_has_no_logits_in_float32():
    """One kernel goes over the logits for the sums of their rows, one makes the gradient in their place."""
    logits = torch.empty(TOKENS, VOCAB, dtype=torch.bfloat16)
    targets, valid = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1, dtype=torch.bool)
    code = cuda_code(lambda *tensors: nats_and_gradient(*tensors, 0.0), logits, targets, valid)
    assert f"empty_strided_cuda(({TOKENS}, {VOCAB})" not in code, "a buffer of the size of the logits"
    bodies = re.split(r"^def (?=triton_)", code, flags=re.MULTILINE)[1:]
    over_all_logits = [body for body in bodies if f"{VOCAB}*x" in body or f"// {VOCAB}" in body]
    assert len(over_all_logits) <= 3 and len(bodies) <= 6  # the third reads the logit of each target


def test_a_block_is_few_kernels():
    """Forward and backward in bfloat16, beside the products of matrices and attention."""
    model = GPTModel._from_config(GPTConfig(vocab_size=8, n_layer=1), attn_implementation="sdpa")
    block = model.transformer.h[0]
    names, values = zip(*block.named_parameters(), strict=True)

    def there_and_back(x, *parameters):
        with torch.autocast("cpu", torch.bfloat16):
            y = functional_call(block, dict(zip(names, parameters, strict=True)), (x,), {})
        return y, *torch.autograd.grad(y.sum(), (x, *parameters))

    x = torch.empty(2, 1024, 768, requires_grad=True)
    code = cuda_code(there_and_back, x, *(value.detach().requires_grad_() for value in values))
    assert len(re.findall(r"extern_kernels\.(mm|addmm)\(", code)) == 12
    assert len(kernels(code)) <= 26, kernels(code)
