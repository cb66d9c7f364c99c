"""What makes the step fast or small must not change what it computes."""

import pytest
import torch
from accelerate import Accelerator
from conftest import needs_compiler
from tiny import LENGTH, VOCAB_SIZE, make_model, train
from torch.utils._python_dispatch import TorchDispatchMode

import modeling.loss
from eval.loss import summed_loss
from eval.models import compile_blocks
from eval.multiple_choice import Question, score
from training.memory import checkpoint_activations, largest_micro_batch
from training.optimizer import make_optimizer, set_learning_rate
from training.settings import OptimizerSettings


@pytest.fixture(scope="module")
def expected():
    losses = train(make_model(attn_implementation="sdpa"))
    assert losses[-1] < losses[0] - 1
    return losses


def checkpointed(kind):
    model = make_model(attn_implementation="sdpa")
    checkpoint_activations(model, kind)
    return model


def compiled(kind=None):
    model = checkpointed(kind) if kind else make_model(attn_implementation="sdpa")
    compile_blocks(model)
    return model


CURVES = {
    "accumulated": lambda: train(make_model(attn_implementation="sdpa"), micro_batches=8),
    "eager attention": lambda: train(make_model(attn_implementation="eager")),
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


@pytest.mark.parametrize("chunk", [5, 10**6])
def test_the_chunks_of_the_loss_do_not_show(expected, chunk, monkeypatch):
    monkeypatch.setattr(modeling.loss, "chunk_tokens", lambda device: chunk)
    difference = train(make_model(attn_implementation="sdpa")) - expected
    assert difference.abs().max() < 1e-4 and abs(difference.mean()) < 2e-5


@needs_compiler
def test_evaluations_within_a_compiled_run_compile_little_and_once():
    """A block for training, a block and the loss for evaluation, each once for all layers and for any batch."""
    from torch._dynamo.utils import counters

    model = compiled()
    torch.compiler.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(0)

    def batch(size):
        ids = torch.randint(VOCAB_SIZE, (size, LENGTH), generator=generator)
        return {"input_ids": ids, "shift_labels": ids}

    def compilations():
        train(model, micro_batches=4)
        summed_loss(model, [batch(4), batch(4), batch(3)])  # the last is what is left over
        questions = [Question([1, 2, 3], [[4, 5], [6], [7, 8, 9][:size]]) for size in (1, 2, 3)]
        score(Accelerator(cpu=True), model, questions, batch_size=2)
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        return counters["stats"]["unique_graphs"]

    first = compilations()
    assert first <= 6 and not counters["graph_break"]
    assert [compilations() for _ in range(2)] == [first, first]


class Calls(TorchDispatchMode):
    """How often an operation has been called."""

    def __init__(self, *operations) -> None:
        super().__init__()
        self.counts = dict.fromkeys(operations, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.counts:
            self.counts[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "products", "activations"), [("none", 4, 1), ("selective", 4, 2), ("full", 7, 2)])
def test_what_is_computed_again(kind, products, activations):
    """Full: all of a block, up to the last that is needed. Selective: what is cheap, and no product of matrices."""
    model = make_model(attn_implementation="sdpa") if kind == "none" else checkpointed(kind)
    ids = torch.randint(VOCAB_SIZE, (2, LENGTH))
    with Calls(torch.ops.aten.addmm.default, torch.ops.aten.gelu.default) as calls:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers = model.config.n_layer
    assert list(calls.counts.values()) == [layers * products, layers * activations]


def test_muon_takes_the_matrices_of_the_blocks():
    model = make_model()
    optimizer = make_optimizer(model, OptimizerSettings(optimizer="muon", muon_learning_rate=0.2, learning_rate=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert sorted(names.values()) == sorted(names[id(p)] for g in optimizer.param_groups for p in g["params"])
    set_learning_rate(optimizer, 0.5)
    assert {("momentum" in group, group["lr"]) for group in optimizer.param_groups} == {(True, 0.1), (False, 0.05)}


def test_muons_update_is_of_adamws_size():
    """Moonlight (arXiv:2502.16982), equation 4: an orthogonal matrix of A x B, scaled by 0.2 sqrt(max(A, B)), has a
    root mean square of 0.2; torch's five iterations come within a third of orthogonal."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerSettings(optimizer="muon", learning_rate=0.01, weight_decay=0.5))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.dim() == 2:
            update = before[name] * (1 - 0.01 * 0.5) - parameter.detach()
            assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=1 / 3), name
            spectrum = torch.linalg.svdvals(update)
            assert spectrum.max() < 2.5 * spectrum.median()


@pytest.mark.parametrize(("most", "found"), [(100, 64), (64, 64), (20, 16), (1, 1)])
def test_the_largest_micro_batch_is_what_does_not_run_out_of_memory(most, found):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_micro_batch(attempt, [1, 2, 4, 8, 16, 32, 64], torch.device("cpu")) == found
    assert tried == [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= 2 * found]


def test_a_model_that_memory_has_no_room_for_is_refused():
    from data_prep.cli import UserError

    def attempt(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="no room for 1 sequence; take a smaller model"):
        largest_micro_batch(attempt, [1, 2], torch.device("cpu"))
