"""The chunked loss against `F.cross_entropy` on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler

import modeling.loss
from modeling import GPTConfig, GPTModel
from modeling.loss import chunk_tokens, linear_cross_entropy, nats_and_gradient, token_cross_entropy


def problem(vocab_size=201, count=50, width=16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, width, generator=generator, requires_grad=True)
    labels = torch.randint(vocab_size, (count,), generator=generator)
    labels[::7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("vocab_size", [201, 256])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("num_items", "z_loss"), [(None, 0.0), (13, 0.0), (torch.tensor(13), 0.0), (None, 0.05)])
def test_value_and_gradients_in_float32(monkeypatch, vocab_size, chunk, num_items, z_loss):
    """z_loss is PaLM's (section 5): times the squared logarithm of the normalizer."""
    monkeypatch.setattr(modeling.loss, "chunk_tokens", lambda device: chunk)
    hidden, weight, labels = problem(vocab_size)
    loss, z_part = linear_cross_entropy(hidden, weight, labels, num_items, z_loss=z_loss)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))

    logits, count = hidden @ weight.T, num_items or (labels != -100).sum()
    z = z_loss * (logits.logsumexp(dim=-1)[labels != -100] ** 2).sum() / count
    expected = F.cross_entropy(logits, labels, reduction="sum") / count + z
    torch.testing.assert_close((loss, z_part), (expected, z.detach()))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (hidden, weight)))


def test_bfloat16_is_as_close_as_bfloat16_logits_allow():
    hidden, weight, labels = problem(vocab_size=1000, count=400, width=64)
    hidden.data *= 0.3
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    exact = F.cross_entropy(hidden @ weight.T, labels)
    exact_hidden, exact_weight = torch.autograd.grad(exact, (hidden, weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=5e-3, rtol=0)
    for gradient, expected in ((hidden.grad, exact_hidden), (weight.grad, exact_weight)):
        assert (gradient - expected).norm() < 0.01 * expected.norm()


def test_the_gradient_of_many_chunks_is_added_up_in_float32(monkeypatch):
    """Also where the weights are bfloat16, as those of a sharded model are while it computes: the sum is rounded once.
    Of a row that every chunk adds as much to, a sum in bfloat16 would stop growing."""
    monkeypatch.setattr(modeling.loss, "chunk_tokens", lambda device: 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(600, 16, generator=generator).bfloat16()
    weight = torch.zeros(64, 16, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((600,), 3)
    linear_cross_entropy(hidden, weight, labels, num_items=1)[0].backward()
    exact = (hidden.float().sum(dim=0) / 64).expand(64, -1).clone()
    exact[3] -= hidden.float().sum(dim=0)
    torch.testing.assert_close(weight.grad.float(), exact, atol=0, rtol=2**-7)


def test_evaluation_keeps_no_gradients():
    hidden, weight, labels = problem()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels)[0].requires_grad


@needs_compiler
def test_compiled_it_is_the_same():
    """Also with a last chunk that is shorter than the others."""
    hidden, weight, labels = problem(count=2 * chunk_tokens(torch.device("cpu")) + 50)
    results = []
    for loss_kernel in (None, torch.compile(nats_and_gradient, dynamic=False)):
        loss, z_part = linear_cross_entropy(hidden, weight, labels, z_loss=1e-2, loss_kernel=loss_kernel)
        results.append((loss, z_part, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(results[1], results[0])


def test_a_second_backward_is_refused():
    """The first one scales the gradients in place."""
    hidden, weight, labels = problem()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was called twice"):
        loss.backward()


def test_the_logits_of_all_tokens_are_never_held():
    """The largest tensor that a training step makes is a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    vocab_size, tokens = 1500, 3 * chunk_tokens(torch.device("cpu"))
    config = GPTConfig(vocab_size=vocab_size, n_positions=tokens, n_embd=8, n_layer=1, n_head=1)
    model = GPTModel(config).train()
    ids = torch.randint(vocab_size, (1, tokens))
    with Largest() as mode:
        model(ids, labels=ids, use_cache=False).loss.backward()
    padded = -(-vocab_size // 128) * 128
    assert mode.elements == tokens // 3 * padded


def test_labels_are_shifted_and_shift_labels_are_not():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    text = torch.randint(64, (2, 13))
    shifted = model(text[:, :-1], shift_labels=text[:, 1:]).loss
    # `labels` predict 12 tokens from 12 positions of 13; the last position has no label.
    torch.testing.assert_close(model(text, labels=text).loss, shifted)
    logits = model(text[:, :-1]).logits
    torch.testing.assert_close(shifted, F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_loss_of_each_token(monkeypatch, chunk):
    monkeypatch.setattr(modeling.loss, "chunk_tokens", lambda device: chunk)
    hidden, weight, labels = problem()
    losses = token_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert (losses[labels == -100] == 0).all() and (labels == -100).any()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), (hidden, weight)), torch.autograd.grad(expected.sum(), (hidden, weight))
    )
    assert token_cross_entropy(hidden, weight, torch.full_like(labels, -100)).tolist() == [0] * len(labels)
