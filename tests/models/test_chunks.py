"""A tower by chunks: the same embeddings and gradients, the same dropout in both forwards, fewer activations."""

import pytest
import torch
from torch import nn

from vlscale.models.chunks import in_chunks

ROWS = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


def tower(dropout: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 4)).double()


def loss_and_gradients(model: nn.Module, embed) -> list[torch.Tensor]:
    """A loss that couples all rows, as the objectives do."""
    torch.manual_seed(2)
    rows = embed(model, ROWS.double())
    loss = (rows @ rows.T).logsumexp(1).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("chunk_size", [1, 4, 5])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk_size):
    whole = loss_and_gradients(tower(0.0), lambda model, x: model(x))
    chunked = loss_and_gradients(tower(0.0), lambda model, x: in_chunks(model, chunk_size, x))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_dropout_falls_the_same_in_both_forwards():
    """The reference draws its masks chunk by chunk and keeps every activation."""
    kept = loss_and_gradients(tower(0.5), lambda model, x: torch.cat([model(part) for part in x.split(4)]))
    seen: list[torch.Tensor] = []

    def watched(model, x):
        model[2].register_forward_hook(lambda module, given, out: seen.append(out.detach().clone()))
        return in_chunks(model, 4, x)

    chunked = loss_and_gradients(tower(0.5), watched)
    for a, b in zip(kept, chunked, strict=True):
        assert torch.equal(a, b)
    assert len(seen) == 6
    first, second = seen[:3], seen[3:]
    assert all(any(torch.equal(a, b) for b in second) for a in first)


def test_activations_are_kept_for_no_chunk():
    """Bytes that autograd saves in the forward: inputs only, not the wide hidden layer."""

    def saved(chunk_size: int | None) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            in_chunks(tower(0.0), chunk_size, ROWS.double())
        return sum(sizes)

    assert saved(4) < saved(None) / 10


def test_one_chunk_is_a_plain_call():
    calls: list[int] = []
    in_chunks(lambda x: calls.append(len(x)) or x, 12, ROWS)
    assert calls == [12]
