"""A tower by chunks: the same embeddings and gradients, the same dropout in both forwards, fewer activations."""

from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlscale.config import parse_overrides, validate
from vlscale.models.chunks import in_chunks
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder

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


CHUNK, CHUNKS = 3, 4
DROPS = "hidden_dropout_prob: 0.3, attention_probs_dropout_prob: 0.3"
WIDTH = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2"


def dual_encoder(locked: str = "[]") -> DualEncoder:
    """Dropout of activations and of attention in both towers; the vision tower leaves out parts of blocks by row."""
    vision = f"model_type: dinov2, image_size: 16, patch_size: 8, mlp_ratio: 2, drop_path_rate: 0.4, {WIDTH}, {DROPS}"
    text = f"model_type: bert, vocab_size: 50, intermediate_size: 32, {WIDTH}, {DROPS}"
    towers = f"vision: {{config: {{{vision}}}}}, text: {{max_length: 6, config: {{{text}}}}}"
    model = f"model={{embed_dim: 8, locked: {locked}, {towers}}}"
    torch.manual_seed(0)
    return build_dual_encoder(validate(parse_overrides([model]), "test").model)


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (CHUNK * CHUNKS, 6), generator=generator)
    return torch.randn(CHUNK * CHUNKS, 3, 16, 16, generator=generator), ids, torch.ones_like(ids)


def by_chunks(encoder: DualEncoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = encoder(*pairs(), CHUNK)
    return out.image, out.text, out.logit_scale


def kept(encoder: DualEncoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same chunks in the same order by autograd alone, which keeps every activation and so every mask."""
    pixels, *captions = (rows.split(CHUNK) for rows in pairs())
    image = torch.cat([encoder.encode_image(part) for part in pixels])
    text = torch.cat([encoder.encode_text(*part) for part in zip(*captions, strict=True)])
    return image, text, encoder.logit_scale.exp().squeeze()


def backward(encoder: DualEncoder, embed, seed: int = 2) -> dict[str, torch.Tensor]:
    """The gradient of a loss that couples all rows, by parameter."""
    torch.manual_seed(seed)
    image, text, scale = embed(encoder)
    F.cross_entropy(scale * image @ text.T, torch.arange(len(image))).backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def test_a_dual_encoder_has_the_gradient_of_its_chunks_kept():
    """Bit for bit with the same masks; with others the gradient is another."""
    expected, found, other = backward(dual_encoder(), kept), backward(dual_encoder(), by_chunks), dual_encoder()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not [name for name, value in backward(other, by_chunks, seed=3).items() if torch.equal(value, found[name])]


def test_all_that_is_random_in_a_dual_encoder_falls_the_same_in_both_forwards():
    """What every dropout and drop path gave, and the rows of the towers, where the masks of attention show."""
    encoder, whole, seen = dual_encoder(), pairs(), defaultdict(list)
    running: dict[str, int] = {}  # the chunk that a tower is at

    def watch(name: str, module: nn.Module) -> None:
        tower = name.split(".")[0]

        def note(module, given, out) -> None:
            rows = out if torch.is_tensor(out) else out.pooler_output
            seen[name, running[tower]].append(rows.detach().clone())

        module.register_forward_hook(note)

    def begin(tower: str, key: str, rows: torch.Tensor) -> None:
        def which(module, given, named) -> None:
            (running[tower],) = (k for k, part in enumerate(rows.split(CHUNK)) if torch.equal(part, named[key]))

        encoder.get_submodule(tower).register_forward_pre_hook(which, with_kwargs=True)

    begin("vision_model", "pixel_values", whole[0])
    begin("text_model", "input_ids", whole[1])
    kinds = ("Dropout", "DropPath")
    random = [name for name, module in encoder.named_modules() if type(module).__name__.endswith(kinds)]
    random = [name for name in random if not name.endswith("self.dropout")]  # attention's own falls in its kernel
    for name in ("vision_model", "text_model", *random):
        watch(name, encoder.get_submodule(name))
    backward(encoder, by_chunks)
    assert len(seen) == CHUNKS * (len(random) + 2)
    for (name, chunk), outs in seen.items():
        first, second = outs[: len(outs) // 2], outs[len(outs) // 2 :]
        assert len(first) == len(second) and all(map(torch.equal, first, second)), f"{name} of chunk {chunk}"
    for name in random:
        rows = torch.cat([out.flatten(1) for chunk in range(CHUNKS) for out in seen[name, chunk]])
        dropped = (rows == 0).all(1) if name.endswith("drop_path") else (rows == 0).flatten()
        assert 0 < dropped.double().mean() < 1, f"{name} drops nothing, or all"


@pytest.mark.parametrize("chunk_size", [CHUNK, CHUNK * CHUNKS])
def test_every_parameter_is_reduced_once_a_step(chunk_size):
    """An engine reduces a gradient where it has been accumulated: in this hook."""
    encoder, reduced = dual_encoder(), Counter()
    for name, parameter in encoder.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: reduced.update([name]))
    learned = backward(encoder, lambda encoder: encoder(*pairs(), chunk_size)[:3])
    assert reduced == dict.fromkeys(learned, 1) and len(learned) > 40


@pytest.mark.parametrize(("locked", "runs"), [("[]", 2), ("[vision]", 1)])
def test_a_locked_tower_runs_once(locked, runs):
    ran, found = [], []
    for chunk_size in (None, CHUNK):
        encoder = dual_encoder(locked).eval()
        encoder.vision_model.register_forward_hook(lambda *call, size=chunk_size: ran.append(size))
        out = encoder(*pairs(), chunk_size)
        (out.image @ out.text.T).logsumexp(1).sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert ran == [None] + [CHUNK] * CHUNKS * runs
    assert found[0].keys() == found[1].keys() and "visual_projection.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
