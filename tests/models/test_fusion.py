"""The fusion encoder: where it comes from, what it sees, and that by chunks it says the same."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.models.test_dual_encoder import IDS, MASK, MODEL, PIXELS, TOWER
from vlscale.models.checkpointing import checkpoint_blocks
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.models.fused_pairs import Fusing, Masked
from vlscale.models.fusion import SPLITTABLE, FusionEncoder, build_fusion
from vlscale.models.masked_head import MaskedHead
from vlscale.sections import FusionConfig, ModelConfig

DEEP = TOWER | {"num_hidden_layers": 3, "vocab_size": 40, "max_position_embeddings": 32}


def text_model(model_type: str = "bert", **changes):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **(DEEP | changes)), dtype=torch.float32).eval()


def build(fusion: dict, text: dict | None = None, **changes):
    torch.manual_seed(0)
    own = {"text": {"config": DEEP | {"model_type": "bert"} | (text or {})}, "fusion": fusion}
    return build_dual_encoder(ModelConfig.model_validate(MODEL | own | changes)).eval()


def tokens(width: int = 32, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    text, vision = (torch.randn(rows, count, size, generator=generator) for count, size in ((5, 32), (7, width)))
    return text, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:rows], vision


@pytest.mark.parametrize("model_type", SPLITTABLE)
def test_a_text_model_is_split(model_type):
    """The tower keeps the lower layers, the fusion encoder starts as the upper ones; both together are the model."""
    whole, text = text_model(model_type), text_model(model_type)
    fusion = build_fusion(FusionConfig(source="text", layers=2), text, vision_width=24).eval()
    assert text.config.num_hidden_layers == len(text.encoder.layer) == 1 and fusion.config.num_hidden_layers == 2
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        lower = text(ids).last_hidden_state
        for layer in fusion.layers:  # without a picture to look at, what it was before
            lower = layer(lower)
        torch.testing.assert_close(lower, whole(ids).last_hidden_state, rtol=0, atol=1e-6)
    fused = fusion(*tokens(24))
    assert fused.shape == (2, 5, 32) and fusion.matching(fused[:, 0]).shape == (2, 2) and fusion.width == 32


@torch.no_grad()
def test_attention_goes_both_ways_and_to_the_picture_and_not_to_padding():
    fusion = build_fusion(FusionConfig(source="text"), text_model(), vision_width=24).eval()
    text, mask, vision = tokens(24)
    for given in (mask, torch.ones_like(mask)):  # without padding transformers may leave the mask out
        fused = fusion(text, given, vision)
        later = text.clone()
        later[:, 2] += 1
        assert ((fusion(later, given, vision) - fused)[:, :2].abs().amax((1, 2)) > 1e-4).all()
    assert ((fusion(text, mask, vision.flip(0)) - fusion(text, mask, vision)).abs().amax((1, 2)) > 1e-5).all()
    padding = text.clone()
    padding[1, 3:] = 9.0
    assert torch.equal(fusion(padding, mask, vision)[1, :3], fusion(text, mask, vision)[1, :3])


def test_it_starts_from_another_models_upper_layers_or_from_a_config(tmp_path):
    other = text_model("roberta", hidden_size=16, num_hidden_layers=4)
    other.save_pretrained(tmp_path / "roberta")
    encoder = build({"source": str(tmp_path / "roberta")})
    assert encoder.text_model.config.num_hidden_layers == 3 and encoder.fusion.config.model_type == "roberta"
    assert [len(encoder.fusion.layers), encoder.fusion.width] == [2, 16]
    for layer, upper in zip(encoder.fusion.layers, other.encoder.layer[2:], strict=True):
        own = layer.state_dict()
        assert all(torch.equal(own[name], value) for name, value in upper.state_dict().items())
    fresh = build({"config": TOWER | {"model_type": "bert", "hidden_size": 48}})
    for model in (encoder, fresh):
        text, _, _ = tokens()
        assert model.fusion(text, torch.ones(2, 5), text).shape == (2, 5, model.fusion.width)


def test_its_config_rebuilds_it(tmp_path):
    fusion = build_fusion(FusionConfig(source="text"), text_model(), vision_width=24, dropout=0.25).eval()
    fusion.config.save_pretrained(tmp_path)
    again = FusionEncoder(AutoConfig.from_pretrained(tmp_path)).eval()
    again.load_state_dict(fusion.state_dict())
    assert torch.equal(again(*tokens(24)), fusion(*tokens(24))) and again.config.hidden_dropout_prob == 0.25


@pytest.mark.parametrize(
    ("fusion", "text", "said"),
    [
        ({"source": "text"}, {"model_type": "albert"}, r"model.text: albert cannot be split .* bert, camembert"),
        ({"source": "text"}, {"num_hidden_layers": 1}, "model.text: 1 layers cannot give half of them"),
        ({"source": "text", "layers": 3}, {}, "model.text: 3 layers cannot give 3 to the fusion encoder"),
        (
            {"config": TOWER | {"model_type": "clip_text_model"}},
            {},
            "whose layers can have cross-attention .*clip_text",
        ),
        ({"source": "text", "config": TOWER}, {}, "expected exactly one of .* got both"),
        ({}, {}, "got neither"),
        ({"config": TOWER | {"model_type": "bert"}, "layers": 2}, {}, "model.fusion.layers=2 goes with"),
    ],
)
def test_what_cannot_be_is_said(fusion, text, said):
    with pytest.raises(ValueError, match=said):
        build(fusion, text)


class Fixed:
    """Negatives that are known beforehand: the next picture, the caption before."""

    chosen = False

    def choose(self, image_emb, text_emb, logit_scale):
        assert image_emb.shape == text_emb.shape == (3, 16) and not image_emb.requires_grad
        self.chosen = True

    def pictures(self, rows):
        return rows.roll(-1, 0)

    def captions(self, rows):
        return rows.roll(1, 0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_a_forward_fuses_pairs_negatives_and_masked_captions(chunk_size):
    """By any chunks the same numbers and gradients as three forwards by hand, and second views as without fusion."""
    encoder = build({"source": "text"}).double()
    encoder.masked_head = MaskedHead(32, 40).double()
    masked_ids, places = IDS.clone(), torch.tensor([1, 5, 6])
    masked_ids.view(-1)[places] = 1
    fusing = Fusing(3, Fixed(), Masked(masked_ids, places, IDS.view(-1)[places], [1, 2, 0]))
    views = torch.cat([PIXELS, PIXELS.flip(0)])
    out = encoder(views, torch.cat([IDS, IDS]), torch.cat([MASK, MASK]), chunk_size=chunk_size, fusing=fusing)
    torch.testing.assert_close(out.image, encoder.encode_image(views))
    torch.testing.assert_close(out.text, encoder.encode_text(IDS, MASK).repeat(2, 1))
    vision, text = encoder.image_tokens(PIXELS)[1], encoder.text_tokens(IDS, MASK)[1]
    met = [encoder.fusion(text, MASK, vision), encoder.fusion(text, MASK, vision.roll(-1, 0))]
    met.append(encoder.fusion(text.roll(1, 0), MASK.roll(1, 0), vision))
    expected = torch.stack([encoder.fusion.matching(each[:, 0]) for each in met], 1)
    torch.testing.assert_close(out.fused.matching, expected)
    torch.testing.assert_close(out.fused.cls, torch.nn.functional.normalize(met[0][:, 0], dim=1))
    read = encoder.fusion(encoder.text_tokens(masked_ids, MASK)[1], MASK, vision).flatten(0, 1)[places]
    scores = encoder.masked_head.scores(encoder.masked_head.transform(read)).log_softmax(1)
    nll = -scores.gather(1, IDS.view(-1)[places][:, None])[:, 0]
    torch.testing.assert_close(out.fused.masked, nll)
    learned = [p for name, p in encoder.named_parameters() if not name.startswith("logit")]
    losses = [
        fused.matching.square().sum() + fused.masked.sum() + fused.cls[:, 0].sum() + rows.sum()
        for fused, rows in (
            (out.fused, out.image),
            (out.fused._replace(matching=expected, masked=nll), encoder.encode_image(views)),
        )
    ]
    pairs = zip(
        *(torch.autograd.grad(loss, learned, allow_unused=True, retain_graph=True) for loss in losses), strict=True
    )
    for got, by_hand in pairs:
        if got is not None or by_hand is not None:
            torch.testing.assert_close(got, by_hand, rtol=1e-8, atol=1e-12)


def test_it_learns_what_belongs_together():
    """Twelve things in noisy words and pictures: after 200 steps nearly every pair is told right, 1/2 by chance."""
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(source="text"), text_model(), vision_width=24, dropout=0.0).train()
    words, looks = torch.randn(12, 3, 32), torch.randn(12, 4, 24)
    optimizer, right = torch.optim.AdamW(fusion.parameters(), lr=2e-3), []
    for _ in range(200):
        thing = torch.randint(12, (32,))
        said = thing.repeat(2)
        shown = torch.cat([thing, (thing + torch.randint(1, 12, (32,))) % 12])
        text = words[said] + 0.3 * torch.randn(64, 3, 32)
        vision = looks[shown] + 0.3 * torch.randn(64, 4, 24)
        logits = fusion.matching(fusion(text, torch.ones(64, 3, dtype=torch.long), vision)[:, 0])
        match = (said == shown).long()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, match).backward()
        optimizer.step()
        right.append(float((logits.argmax(1) == match).double().mean()))
    assert sum(right[:10]) / 10 < 0.7 and sum(right[-20:]) / 20 > 0.9


def test_its_blocks_can_be_computed_again():
    gradients = []
    for again in (False, True):
        encoder = build({"source": "text"}).double().train()
        if again:
            checkpoint_blocks(encoder)
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in encoder.fusion.layers) == again
        out = encoder(PIXELS, IDS, MASK, fusing=Fusing(3, Fixed()))
        learned = list(encoder.fusion.layers.parameters())
        gradients.append(torch.autograd.grad(out.fused.matching.square().sum(), learned))
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, kept)


def test_in_bf16_it_gives_bf16():
    encoder = build({"source": "text"}).bfloat16()
    out = encoder(PIXELS, IDS, MASK, fusing=Fusing(3, Fixed()))
    assert (
        out.fused.matching.dtype == out.fused.cls.dtype == torch.bfloat16 and torch.isfinite(out.fused.matching).all()
    )
