"""Blocks that are computed again: the same gradient bit for bit, dropout included, from a part of the memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vlscale.config import parse_overrides, validate
from vlscale.models.checkpointing import checkpoint_blocks
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder

SMALL = "hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2, intermediate_size: 32"


def encoder_of(locked: str = "[]") -> DualEncoder:
    vision = f"vision: {{config: {{model_type: vit, image_size: 16, patch_size: 8, {SMALL}}}}}"
    text = f"text: {{max_length: 6, config: {{model_type: bert, vocab_size: 50, {SMALL}}}}}"
    model = f"model={{embed_dim: 8, dropout: 0.3, locked: {locked}, {vision}, {text}}}"
    torch.manual_seed(0)
    return build_dual_encoder(validate(parse_overrides([model]), "test").model)


def gradient(encoder: DualEncoder, chunk_size: int | None) -> tuple[list[torch.Tensor], int]:
    """And how many numbers the forward saved for it."""
    generator, saved = torch.Generator().manual_seed(1), 0
    pixels = torch.randn(8, 3, 16, 16, generator=generator)
    ids = torch.randint(5, 50, (8, 6), generator=generator)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    torch.manual_seed(2)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = encoder(pixels, ids, torch.ones_like(ids), chunk_size)
    (out.image @ out.text.T).square().sum().backward()
    return [p.grad for p in encoder.parameters() if p.grad is not None], saved


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("locked", ["[]", "[vision]"])
def test_the_gradient_is_the_same_bit_for_bit(chunk_size, locked):
    plain, checkpointed = encoder_of(locked), encoder_of(locked)
    checkpoint_blocks(checkpointed)
    expected, whole = gradient(plain, chunk_size)
    found, kept = gradient(checkpointed, chunk_size)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert chunk_size is not None or kept < whole / 2


def test_a_tower_without_such_blocks_is_refused():
    encoder = encoder_of()
    encoder.text_model.activation_checkpointing_enable = lambda how: (_ for _ in ()).throw(ValueError("no support"))
    with pytest.raises(
        ValueError, match=r"text tower \(bert\) has no blocks.*activation_checkpointing=false and, .*train\.chunk_size"
    ):
        checkpoint_blocks(encoder)
