"""Options that make a step fast or small do not change its result."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import needs_compiler
from tiny import LENGTH, VOCAB_SIZE, batches, make_model, train
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.common.command_line import UserError
from eval.common.models import compile_blocks
from eval.common.multiple_choice import Question, score
from eval.loss import summed_loss
from modeling import GPTConfig, GPTModel
from training.engine.model import checkpoint_activations, largest_micro_batch
from training.engine.muon import Muon, orthogonalize_together
from training.engine.optimizer import make_optimizer, set_learning_rate
from training.engine.step import training_step
from training.settings.schema import OptimizerSettings


@pytest.fixture(scope="module")
def expected():
    losses = train(make_model(attn_implementation="sdpa"))
    assert losses[-1] < losses[0] - 1
    return losses


def checkpointed(kind):
    model = make_model(attn_implementation="sdpa")
    checkpoint_activations(model, selective=kind == "selective")
    return model


def compiled(kind=None):
    model = checkpointed(kind) if kind else make_model(attn_implementation="sdpa")
    compile_blocks(model)
    return model


CURVES = {
    "full checkpointing": lambda: train(checkpointed("full")),
    "selective checkpointing": lambda: train(checkpointed("selective")),
    "compiled": lambda: train(compiled()),
    "compiled, selective checkpointing, accumulated": lambda: train(compiled("selective"), micro_batches=8),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_compiler if "compiled" in name else []) for name in CURVES]
)
def test_the_loss_curve_is_the_same(expected, name):
    difference = CURVES[name]() - expected
    assert difference.abs().max() < 1e-4 and abs(difference.mean()) < 2e-5


def test_evaluations_leave_the_graphs_of_training_as_they_are(monkeypatch):
    """A block for training, one for validation, one for HellaSwag, and the loss: each once for all layers, of one
    shape. A graph whose shapes are symbols would be slower for all of them."""
    from torch._dynamo.utils import counters

    graphs = []

    def count(graph, inputs, **options):
        shapes = [n for tensor in inputs if isinstance(tensor, torch.Tensor) for n in tensor.shape]
        graphs.append([n for n in (*inputs, *shapes) if isinstance(n, torch.SymInt)])
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", count)
    torch.compiler.reset()
    counters.clear()
    model = compiled()
    generator = torch.Generator().manual_seed(0)

    def batch(size):
        ids = torch.randint(VOCAB_SIZE, (size, LENGTH), generator=generator)
        return {"input_ids": ids, "shift_labels": ids}

    def compilations():
        train(model, micro_batches=4)
        summed_loss(model, [batch(4), batch(4)])
        questions = [Question([1, 2, 3], [[4, 5], [6], [7, 8, 9][:size]]) for size in (1, 2, 3)]
        score(Accelerator(cpu=True), model, questions, batch_size=2)
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        return len(graphs)

    first = compilations()
    assert first <= 6 and not counters["graph_break"]
    assert [compilations() for _ in range(2)] == [first, first]
    assert not any(graphs)


def test_a_block_is_one_graph_under_ddp(monkeypatch):
    """Dynamo splits it by default where a bucket of gradients ends, the first after 1 MiB."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graphs.append(graph) or graph)
    torch.compiler.reset()
    config = GPTConfig(vocab_size=VOCAB_SIZE, n_positions=LENGTH, n_embd=256, n_layer=2, n_head=4)
    model = GPTModel(config).train()
    compile_blocks(model)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for batch in batches(2):
            parallel(**batch, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 2  # the block, and what the loss does with logits


class Calls(TorchDispatchMode):
    """How often an operation has been called."""

    def __init__(self, *operations) -> None:
        super().__init__()
        self.counts = dict.fromkeys(operations, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.counts:
            self.counts[function] += 1
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Operations that make the host wait for a device: their result, or its size, is a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:  # of unknown size by a mask alone
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        else:
            waits = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags)
        if waits:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("optim", "attention"), [("adamw", "sdpa"), ("muon", "eager")])
def test_a_step_never_waits_for_the_device(optim, attention):
    """Not for the mask of documents either, nor to hear whether the gradients are finite."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = make_model(attn_implementation=attention)
    model.z_loss = 1e-4
    model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerSettings(optim=optim)))
    batch = batches(1)[0]
    batch["position_ids"] = torch.arange(LENGTH).expand_as(batch["input_ids"]) % 10
    with Waits() as waits:
        training_step(accelerator, model, optimizer, [batch, batch], max_grad_norm=1.0)
    assert waits.seen == []


@pytest.mark.parametrize(("kind", "products", "activations"), [("none", 4, 1), ("selective", 4, 2), ("full", 7, 2)])
def test_what_is_computed_again(kind, products, activations):
    """Full: all of a block, up to the last that is needed. Selective: what is cheap, and no product of matrices."""
    model = make_model(attn_implementation="sdpa") if kind == "none" else checkpointed(kind)
    ids = torch.randint(VOCAB_SIZE, (2, LENGTH))
    with Calls(torch.ops.aten.addmm.default, torch.ops.aten.gelu.default) as calls:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers = model.config.n_layer
    assert list(calls.counts.values()) == [layers * products, layers * activations]


def test_muon_is_torchs():
    """Over steps of `torch.optim.Muon` on the transposed matrices, but for what sharding and `found_inf` need."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((24, 8), (8, 24), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in matrices] for matrices in (start, [m.T for m in start]))
    one = Muon(ours, lr=0.01, weight_decay=0.2, momentum=0.9)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    one.found_inf = torch.tensor(0.0)
    for _ in range(5):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            pair[0].grad, pair[1].grad = gradient.clone(), gradient.T.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, [parameter.T for parameter in theirs], atol=1e-6, rtol=1e-6)


def test_orthogonalization_in_float32():
    """Jordan's iteration, written out in float64, on matrices of very different singular values."""
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(shape, generator=generator) @ torch.diag(torch.logspace(0, -5, shape[1]))
        for shape in ((24, 8), (8, 24), (16, 16), (8, 9), (24, 8))
    ]
    for matrix, result in zip(matrices, orthogonalize_together(matrices, torch.float32), strict=True):
        expected = matrix.double() / matrix.double().norm()
        for _ in range(5):
            gram = expected @ expected.T
            expected = 3.4445 * expected - 4.7750 * gram @ expected + 2.0315 * gram @ gram @ expected
        torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


def test_queries_keys_and_values_are_orthogonalized_apart():
    """One matrix of three is updated as three matrices are."""
    generator = torch.Generator().manual_seed(0)
    three = [torch.nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(3)]
    together = torch.nn.Parameter(torch.cat([p.detach() for p in three], dim=1))
    apart = Muon(three, lr=0.01, weight_decay=0.2, momentum=0.9)
    fused = Muon([{"params": [together], "parts": 3}], lr=0.01, weight_decay=0.2, momentum=0.9)
    for p in three:
        p.grad = torch.randn(8, 8, generator=generator)
    together.grad = torch.cat([p.grad for p in three], dim=1)
    apart.step()
    fused.step()
    torch.testing.assert_close(together, torch.cat(three, dim=1), atol=0, rtol=0)
    model = make_model()
    groups = make_optimizer(model, OptimizerSettings(optim="muon")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    split = {names[id(p)] for group in groups if group.get("parts") == 3 for p in group["params"]}
    assert split == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(kind):
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerSettings(optim=kind)))
    good, bad = batches(2)
    training_step(accelerator, model, optimizer, [good], max_grad_norm=1.0)
    before = [tensor.clone() for tensor in (*model.parameters(), *values(optimizer))]
    hook = model.transformer.h[0].mlp.register_forward_hook(lambda *arguments: arguments[-1] * torch.inf)
    assert not training_step(accelerator, model, optimizer, [bad], max_grad_norm=1.0)["grad_norm"].isfinite()
    hook.remove()
    assert all(map(torch.equal, before, (*model.parameters(), *values(optimizer))))
    training_step(accelerator, model, optimizer, [good], max_grad_norm=1.0)
    assert not any(map(torch.equal, before, (*model.parameters(), *values(optimizer))))


@pytest.fixture
def fp16():
    """An accelerator as on a GPU in fp16, which Accelerate does not do on a CPU: torch's autocast and loss scale."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**10)
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_fp16_is_close_to_float32(kind, fp16):
    losses = train(make_model(), accelerator=fp16, optim=kind)
    AcceleratorState._reset_state(reset_partial_state=False)
    in_float32 = train(make_model(), optim=kind)
    assert 0 < (losses - in_float32).abs().max() < 2e-2
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loss_scale_that_is_too_large_is_halved_by_steps_that_change_nothing(kind, fp16):
    fp16.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    model = make_model()
    model, optimizer = fp16.prepare(model, make_optimizer(model, OptimizerSettings(optim=kind), fp16.mixed_precision))
    before = [parameter.clone() for parameter in model.parameters()]
    skipped = 0
    while not training_step(fp16, model, optimizer, batches(1), max_grad_norm=1.0)["grad_norm"].isfinite():
        skipped += 1
        assert fp16.scaler.get_scale() == 2.0 ** (30 - skipped)
        assert all(map(torch.equal, before, model.parameters()))
    assert skipped and not any(map(torch.equal, before, model.parameters()))


def values(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


def test_an_optimizer_that_would_take_any_gradient_is_refused(monkeypatch):
    monkeypatch.setattr("training.engine.optimizer.AdamW", lambda *groups, fused, **options: AdamW(*groups, **options))
    with pytest.raises(TypeError, match="AdamW ignores found_inf"):
        make_optimizer(make_model(), OptimizerSettings(optim="adamw"))


@pytest.mark.parametrize("tied", [True, False])
def test_decay_on_matrices_and_embeddings_only(tied):
    model = GPTModel(GPTConfig(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied))
    settings = OptimizerSettings(optim="adamw", weight_decay=0.3)
    groups = make_optimizer(model, settings).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(named)
    for name, parameter in named.items():
        matrix = name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")) or (
            ".h." in name and parameter.dim() == 2
        )
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["fused"] for group in groups)


def test_muon_takes_the_matrices_of_the_blocks():
    model = make_model()
    optimizer = make_optimizer(model, OptimizerSettings(optim="muon", muon_learning_rate=0.2, learning_rate=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert sorted(names.values()) == sorted(names[id(p)] for g in optimizer.param_groups for p in g["params"])
    set_learning_rate(optimizer, 0.5)
    assert {("momentum" in group, group["lr"]) for group in optimizer.param_groups} == {(True, 0.1), (False, 0.05)}


@pytest.mark.parametrize(("most", "found"), [(101, 64), (64, 64), (20, 16), (1, 1)])
def test_the_largest_micro_batch_is_what_no_process_runs_out_of_memory_with(most, found):
    """Two processes, of which one has less memory: both try the same sizes, and neither one that the other does not."""
    sizes, tried = [1, 2, 4, 8, 16, 32, 64], {most: [], 100: []}
    answers, all_there = {}, threading.Barrier(2, timeout=60)

    def process(most):
        def attempt(size):
            tried[most].append(size)
            if size > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def all_agree(answer):
            answers[most] = answer
            all_there.wait()
            answer = all(answers.values())
            all_there.wait()
            return answer

        return largest_micro_batch(attempt, sizes, torch.device("cpu"), all_agree)

    with ThreadPoolExecutor(2) as processes:
        assert list(processes.map(process, tried)) == [found, found]
    assert tried[most] == tried[100] == [size for size in sizes if size <= 2 * found]


def test_a_model_that_memory_has_no_room_for_is_refused():
    def attempt(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="no memory for 1 sequence; take a smaller model"):
        largest_micro_batch(attempt, [1, 2], torch.device("cpu"), lambda answer: answer)
