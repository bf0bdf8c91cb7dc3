"""Rates by depth for real towers, and towers that wait: bit for bit unchanged until their step, at every ZeRO stage."""

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.conftest import TINY
from vlscale.config import parse_overrides, validate
from vlscale.distributed import Ranks
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder
from vlscale.sections import Config, ModelConfig, OptimConfig
from vlscale.train.deepspeed_json import json_for_deepspeed
from vlscale.train.engine import start_ranks
from vlscale.train.optimizer import build_optimizer, layer_depths, rate_scales, set_rates

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 3}
PICTURES = SMALL | {"image_size": 16, "patch_size": 8}
TOWERS = {  # a name at the bottom, one in the middle of the first and last block, one at the top
    "vit": (PICTURES, "embeddings.cls_token", "pooler.dense.weight"),
    "bert": (SMALL, "embeddings.word_embeddings.weight", "pooler.dense.bias"),
    "clip_vision_model": (PICTURES, "embeddings.class_embedding", "post_layernorm.weight"),
    "clip_text_model": (SMALL, "embeddings.token_embedding.weight", "final_layer_norm.weight"),
    "dinov2": (PICTURES, "embeddings.cls_token", "layernorm.weight"),
}


def meta_tower(model_type: str, **settings) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", TOWERS)
def test_depth_counts_blocks_from_the_embeddings_to_the_pooler(model_type):
    settings, bottom, top = TOWERS[model_type]
    depths = layer_depths(meta_tower(model_type, **settings))
    assert depths[_ending(depths, bottom)] == 0 and depths[_ending(depths, top)] == 4
    for block in range(3):
        inside = {depth for name, depth in depths.items() if f".{block}." in f".{name}" and "layer" in name}
        assert inside == {block + 1}
    assert set(depths.values()) == {0, 1, 2, 3, 4}


def test_stages_of_blocks_count_on():
    """Swin: two stages of two and one blocks; what joins the stages belongs to the block before it."""
    settings = {
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
    }
    depths = layer_depths(meta_tower("swinv2", **settings))
    found = {
        (s, b): {d for n, d in depths.items() if f"layers.{s}.blocks.{b}." in n} for s, b in ((0, 0), (0, 1), (1, 0))
    }
    assert found == {(0, 0): {1}, (0, 1): {2}, (1, 0): {3}}
    assert {d for n, d in depths.items() if "layers.0.downsample" in n} == {2}
    assert depths["layernorm.weight"] == 4 and depths["embeddings.patch_embeddings.projection.weight"] == 0


def _ending(names, end: str) -> str:
    (found,) = [name for name in names if name.endswith(end)]
    return found


class TwoTowers(nn.Module):
    """The names of a dual encoder on towers of three linear blocks."""

    def __init__(self):
        super().__init__()
        for name in ("vision_model", "text_model"):
            tower = nn.Module()
            tower.embeddings = nn.Linear(4, 4)
            tower.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            tower.pooler = nn.Linear(4, 4)
            setattr(self, name, tower)
        self.visual_projection = nn.Linear(4, 4, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        for tower in (self.vision_model, self.text_model):
            for layer in (tower.embeddings, *tower.layer, tower.pooler):
                x = torch.tanh(layer(x)) + x
        return (self.visual_projection(x) * self.logit_scale).square().mean()


def test_rates_fall_by_depth_and_the_heads_learn_at_the_full_rate():
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=1.0, layer_decay=0.5, weight_decay=0.0))
    set_rates(optimizer, lr=0.1, step=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.ones(2, 4)).backward()
    optimizer.step()
    expected = rate_scales(model, 0.5)
    assert expected["vision_model.embeddings.weight"] == 0.5**4 and expected["text_model.pooler.bias"] == 1
    assert expected["logit_scale"] == expected["visual_projection.weight"] == 1
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), 0.1 * expected[name] * p.grad, rtol=1e-3, atol=1e-7)


def encoder_of(fusion: dict | None) -> DualEncoder:
    """A text model of four layers, that many of which the fusion encoder may take."""
    text = TINY["model"]["text"]["config"] | {"num_hidden_layers": 4, "vocab_size": 20}
    given = TINY["model"] | {"text": {"config": text}, "fusion": fusion}
    return build_dual_encoder(ModelConfig.model_validate(given))


def test_layers_that_were_the_text_models_own_learn_as_they_would_in_it():
    whole = rate_scales(encoder_of(None), 0.5)
    split = rate_scales(encoder_of({"source": "text", "layers": 3}), 0.5)
    layers = "text_model.encoder.layer."
    for name, rate in whole.items():
        block, inside = name.removeprefix(layers).split(".", 1) if name.startswith(layers) else (0, "")
        moved = name if int(block) == 0 else f"fusion.body.encoder.layer.{int(block) - 1}.{inside}"
        assert split[moved] == rate, name
    assert whole[layers + "0.output.dense.weight"] == 0.5**4
    heads = {"fusion.matching.weight", "fusion.matching.bias", "text_model.pooler.dense.weight"}
    assert {split[name] for name in heads} == {1.0}
    assert split["fusion.body.encoder.layer.2.crossattention.self.key.weight"] == 0.5


def test_a_fusion_encoder_of_its_own_stands_on_no_tower():
    own = TINY["model"]["text"]["config"] | {"num_hidden_layers": 2, "hidden_size": 16}
    scales, alone = rate_scales(encoder_of({"config": own}), 0.5), rate_scales(encoder_of(None), 0.5)
    assert {name: scales[name] for name in alone} == alone
    layers = {name: rate for name, rate in scales.items() if name.startswith("fusion.body")}
    assert all(rate == 0.5 ** (2 - int(name.split(".")[4])) for name, rate in layers.items()) and layers
    rest = {rate for name, rate in scales.items() if name.startswith("fusion.") and name not in layers}
    assert rest == {1.0}  # the projections of both towers' tokens, and the head


def test_only_a_fusion_encoder_that_is_there_can_wait():
    with pytest.raises(ValueError, match=r"there is no fusion encoder; leave fusion out, or set model\.fusion"):
        build_optimizer(encoder_of(None), OptimConfig(unlock_after={"fusion": 3}))


def test_the_log_says_the_rates_and_the_waiting(caplog):
    caplog.set_level("INFO")
    build_optimizer(TwoTowers(), OptimConfig(lr=1e-3, layer_decay=0.5, unlock_after={"text": 7}))
    assert (
        "vision tower: learning rate by depth, embeddings first: 6.25e-05 0.000125 0.00025 0.0005 0.001" in caplog.text
    )
    assert "text tower: locked until after step 7" in caplog.text


def test_a_tower_that_never_learns_cannot_be_unlocked():
    model = TwoTowers()
    model.vision_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"vision tower is in model\.locked and never learns"):
        build_optimizer(model, OptimConfig(unlock_after={"vision": 3}))


def steps(model: nn.Module, optim: OptimConfig, first: int, last: int, seen: list[float] | None = None) -> None:
    optimizer = build_optimizer(model, optim)
    for step in range(first, last + 1):
        set_rates(optimizer, optim.lr, step)
        optimizer.zero_grad()
        model(_batch(step)).backward()
        if seen is not None:
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()


def _batch(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def test_what_waits_is_as_if_it_were_locked_and_then_begins_as_a_new_optimizer_would():
    optim = OptimConfig(lr=1e-2, weight_decay=0.3, betas=(0.9, 0.999), unlock_after={"vision": 3})
    torch.manual_seed(0)
    waiting, locked = TwoTowers(), TwoTowers()
    locked.load_state_dict(waiting.state_dict())
    locked.vision_model.requires_grad_(False)
    norms: list[float] = []
    steps(waiting, optim, 1, 3, norms)
    free = OptimConfig(lr=1e-2, weight_decay=0.3, betas=(0.9, 0.999))
    locked_optimizer = build_optimizer(locked, free)
    for step in (1, 2, 3):
        locked_optimizer.zero_grad()
        locked(_batch(step)).backward()
        learned = [p.grad for p in locked.parameters() if p.grad is not None]
        assert norms[step - 1] == pytest.approx(torch.nn.utils.get_total_norm(learned).item(), rel=1e-6)
        locked_optimizer.step()
    for (name, a), b in zip(waiting.named_parameters(), locked.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_first_step_of_an_unlocked_tower_is_a_first_step_of_adam():
    """Its size is the rate itself: moments and their correction begin with the tower."""
    optim = OptimConfig(lr=1e-2, eps=1e-12, weight_decay=0.0, betas=(0.9, 0.999), unlock_after={"vision": 5})
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = build_optimizer(model, optim)
    for step in range(1, 7):
        set_rates(optimizer, optim.lr, step)
        start = model.vision_model.pooler.weight.detach().clone()
        optimizer.zero_grad()
        model(_batch(step)).backward()
        optimizer.step()
        moved = (model.vision_model.pooler.weight - start).abs()
        assert (moved == 0).all() if step <= 5 else torch.allclose(moved, torch.full_like(moved, 1e-2), rtol=1e-3)


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(config_of(0, "fp32").engine)


def config_of(stage: int, dtype: str) -> Config:
    keys = [
        "optim.lr=0.01",
        "optim.clip_norm=0",
        "optim.weight_decay=0.3",
        "optim.layer_decay=0.8",
        "optim.unlock_after={vision: 2}",
    ]
    zero = "zero_optimization: {reduce_bucket_size: 1000, stage3_param_persistence_threshold: 0}"
    keys += [f"engine={{threads: 1, zero_stage: {stage}, dtype: {dtype}, deepspeed: {{{zero}}}}}"]
    return validate(parse_overrides([*keys, "train={global_batch_size: 8, max_steps: 4}"]), "test")


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_under_deepspeed_a_tower_waits_and_learns_the_same_across_a_resume(ranks, tmp_path, stage, dtype):
    """Four steps at once, and two and two with a checkpoint between: one trajectory, the plain optimizer's."""
    config = config_of(stage, dtype)
    torch.manual_seed(0)
    plain = TwoTowers()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    whole = _run_engine(config, ranks, start, range(1, 5))
    half = _run_engine(config, ranks, start, range(1, 3), save=tmp_path)
    rest = _run_engine(config, ranks, start, range(3, 5), load=tmp_path)
    for name, value in start.items():
        waits = name.startswith("vision_model")
        begun = value.bfloat16().float() if dtype == "bf16" else value  # DeepSpeed's master weights begin rounded
        assert torch.equal(half[name], begun) == waits, name
        assert torch.equal(whole[name], rest[name]) and not torch.equal(whole[name], half[name]), name
    if dtype == "fp32":
        steps(plain, config.optim, 1, 4)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)


def _run_engine(config, ranks, start, numbers, save=None, load=None) -> dict[str, torch.Tensor]:
    """The master weights after some steps, float32."""
    model = TwoTowers()
    model.load_state_dict(start)
    optimizer = build_optimizer(model, config.optim)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=json_for_deepspeed(config, ranks.size))
    if load is not None:
        engine.load_checkpoint(str(load), tag="engine")
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    for step in numbers:
        set_rates(optimizer, config.optim.lr, step)
        engine.backward(engine(_batch(step).to(dtype)))
        engine.step()
    if save is not None:
        engine.save_checkpoint(str(save), tag="engine")
    weights = {}
    for name, p in engine.module.named_parameters():
        full = safe_get_full_fp32_param(p)
        weights[name] = (p if full is None else full).detach().float().clone()
    engine.destroy()
    return weights
