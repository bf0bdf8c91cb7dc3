"""What a tower costs, by running its own code on tensors that have shapes but no memory.

A fake tensor answers every operation with a tensor of the right shape, type and device and no data, so that a tower of
any size goes through a real forward and backward in seconds; the storages that live at each moment are added up.
Nothing is estimated from layer counts: what a Hugging Face model saves for its backward is what its code saves.

With activation checkpointing a tower is traced twice, with and without: a trace of the recomputation would keep all
blocks, since fake storages outlive it, where a real backward holds one block at a time.

Attention is the fused kernel's wherever the model and its dropout allow one, as on a GPU.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlscale.data.images import ImageSpec, normalise
from vlscale.models import siglip
from vlscale.models.checkpointing import checkpoint_blocks
from vlscale.models.dual_encoder import DualEncoder
from vlscale.models.fused_pairs import Fused, Fusing, Masked, fuse_chunk
from vlscale.models.fusion import FusionEncoder, config_for, upper_layers
from vlscale.models.hf_folder import load_tokenizer
from vlscale.models.hub_names import check_source
from vlscale.models.masked_head import MaskedHead
from vlscale.models.teacher_heads import TeacherHeads
from vlscale.models.towers import Modality, image_size, one_line, set_dropout
from vlscale.sections import Config, TextConfig


@dataclass(frozen=True)
class TowerCost:
    """Of one forward and backward over some rows. Bytes count neither parameters nor inputs."""

    parameters: int
    learned: int
    largest: int  # numbers in the largest learned parameter
    width: int  # of what the tower gives before its projection, or the fusion encoder for a pair
    saved: int  # bytes that wait for the backward
    largest_block: int  # of them, in the block that has most
    peak: int  # bytes at the highest point, without gradients of parameters
    peak_with_gradients: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class FusedCost(TowerCost):
    """Of both towers and the fusion encoder together; parameters are the fusion encoder's, with the head of masked
    words. `there`, `back`: bytes of a pair's negatives on their way from another rank, and of their gradients."""

    there: int
    back: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still live; their peak, all and without gradients."""

    def __init__(self, module: nn.Module, *inputs: torch.Tensor):
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_without_gradients = self.largest_block = self._begun = 0
        self._known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers(), *inputs)}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._is_gradient) for p in module.parameters() if p.requires_grad
        ]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def watch(self, block: nn.Module) -> None:
        """Take note of what a block's forward leaves behind."""

        def begin(*_) -> None:
            self._begun = self.now

        def end(*_) -> None:
            self.largest_block = max(self.largest_block, self.now - self._begun)

        self._hooks += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        self.gradients += parameter.grad.untyped_storage().nbytes()


def trace_towers(config: Config, rows: dict[Modality, int], *, learning: bool = True) -> dict[Modality, TowerCost]:
    """The costs of both towers with their projections, each over its own number of rows at once; forward only where
    they do not learn."""
    if config.engine.activation_checkpointing and learning:
        engine = config.engine.model_copy(update={"activation_checkpointing": False})
        plain = trace_towers(config.model_copy(update={"engine": engine}), rows)
    encoder = _skeleton(config)
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    side, length = image_size(encoder.vision_model), config.model.text.max_length
    with FakeTensorMode(), torch.set_grad_enabled(learning):
        _without_memory(encoder, dtype)
        pixels = torch.zeros(rows["vision"], 3, side, side, dtype=torch.uint8)
        ids = torch.zeros(rows["text"], length, dtype=torch.long)
        vision = nn.ModuleList([encoder.vision_model, encoder.visual_projection])
        text = nn.ModuleList([encoder.text_model, encoder.text_projection])
        found = {
            "vision": _trace(vision, encoder.encode_image, pixels),
            "text": _trace(text, encoder.encode_text, ids, torch.ones_like(ids)),
        }
    if config.engine.activation_checkpointing and learning:
        found |= {name: _one_block_at_a_time(plain[name], found[name]) for name in found.keys() - config.model.locked}
    return found


def trace_fused(config: Config, rows: dict[Modality, int], pairs: int, *, chunk: bool) -> FusedCost:
    """One forward and backward over `rows` of all views with the fusion encoder on the first `pairs`; or over a chunk
    of `pairs`, whose negatives come as inputs."""
    if config.engine.activation_checkpointing:
        engine = config.engine.model_copy(update={"activation_checkpointing": False})
        plain = trace_fused(config.model_copy(update={"engine": engine}), rows, pairs, chunk=chunk)
    encoder, o, length = _skeleton(config, fusing=True), config.objective, config.model.text.max_length
    side, others = image_size(encoder.vision_model), _Travelled()
    with FakeTensorMode():
        _without_memory(encoder, torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32)
        ids = torch.zeros(pairs, length, dtype=torch.long)
        masked = None
        if o.mlm_weight > 0:
            places = torch.arange(round(o.mlm_probability * ids.numel()))
            masked = Masked(ids, places, torch.zeros_like(places), [])
        if chunk:
            given = torch.zeros(pairs, 3, side, side, dtype=torch.uint8), ids, torch.ones_like(ids)
            given = tuple(row.clone() for row in given * (1 + (o.matching_weight > 0)))
            there, back = sum(row[0].nbytes for row in given[3:]), 0
            found = _trace(encoder, lambda *rows: _sum(fuse_chunk(encoder, masked, *rows)), *given)
        else:
            fusing = Fusing(pairs, others if o.matching_weight > 0 else None, masked)
            ids = torch.zeros(rows["text"], length, dtype=torch.long)
            given = torch.zeros(rows["vision"], 3, side, side, dtype=torch.uint8), ids, torch.ones_like(ids)
            found = _trace(encoder, lambda *rows: _sum(encoder(*rows, fusing=fusing)), *given)
            there, back = others.there, others.back
    if config.engine.activation_checkpointing:
        found = _one_block_at_a_time(plain, found)
    own = [p for part in (encoder.fusion, encoder.masked_head) if part is not None for p in part.parameters()]
    size, largest = sum(p.numel() for p in own), max(p.numel() for p in own)
    counted = vars(found) | {"parameters": size, "learned": size, "largest": largest, "width": encoder.fusion.width}
    return FusedCost(**counted, there=there, back=back)


def trace_teacher_heads(config: Config, image_width: int, text_width: int, pairs: int) -> TowerCost:
    """Of the projections of both teachers' embeddings."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        heads = TeacherHeads(image_width, text_width, config.model.embed_dim)
    with FakeTensorMode():
        _without_memory(heads, dtype)
        image, text = (torch.zeros(pairs, width, dtype=dtype) for width in (image_width, text_width))
        return _trace(heads, lambda *rows: _sum(heads(*rows)), image, text)


class _Travelled:
    """Hard negatives that are the pairs themselves, copied as real ones are; counts what would travel for a pair."""

    chosen = True

    def __init__(self) -> None:
        self.there = self.back = 0

    def choose(self, *_: torch.Tensor) -> None: ...

    def pictures(self, rows: torch.Tensor) -> torch.Tensor:
        self.there += rows[0].nbytes
        self.back += rows[0].nbytes * rows.requires_grad
        return rows[torch.arange(len(rows))]

    captions = pictures


def _sum(made: tuple[torch.Tensor | Fused | None, ...]) -> torch.Tensor:
    """Of what a forward gave, so that all of it has a gradient."""
    return sum(_sum(part) if isinstance(part, tuple) else part.sum() for part in made if part is not None)


def _one_block_at_a_time(plain: TowerCost, kept: TowerCost) -> TowerCost:
    """The peak of a tower whose blocks are computed again: what it keeps, the largest block, and what an ordinary
    backward needs beyond what was saved."""
    beyond = kept.saved + plain.largest_block - plain.saved
    return replace(
        kept,
        largest_block=plain.largest_block,
        peak=plain.peak + beyond,
        peak_with_gradients=plain.peak_with_gradients + beyond,
    )


def picture_side(config: Config) -> int:
    """Pixels a side that the vision tower takes."""
    return image_size(_tower("vision", config))


def _trace(module: nn.Module, encode: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> TowerCost:
    learned = [p.numel() for p in module.parameters() if p.requires_grad]
    live = LiveBytes(module, *inputs)
    for block in module.modules():
        if isinstance(block, GradientCheckpointingLayer):
            live.watch(block)
    with live, FlopCounterMode(display=False) as counter:
        rows = encode(*inputs)
        saved, forward = live.now, counter.get_total_flops()
        if rows.requires_grad:
            rows.sum().backward()
        backward = counter.get_total_flops() - forward
    return TowerCost(
        parameters=sum(p.numel() for p in module.parameters()),
        learned=sum(learned),
        largest=max(learned, default=0),
        width=module[1].in_features if isinstance(module, nn.ModuleList) else 0,
        saved=saved,
        largest_block=live.largest_block,
        peak=live.peak_without_gradients,
        peak_with_gradients=live.peak,
        forward_flops=forward,
        backward_flops=backward,
    )


def _skeleton(config: Config, *, fusing: bool = False) -> DualEncoder:
    """The run's dual encoder without weights."""
    with torch.device("meta"):
        vision, text = _tower("vision", config), _tower("text", config)
        fusion = _fusion(config, vision) if fusing else None
        encoder = DualEncoder(vision, text, config.model, config.objective.loss == "sigmoid", fusion)
        if fusing and config.objective.mlm_weight > 0:
            encoder.masked_head = MaskedHead(fusion.width, text.config.vocab_size)
    encoder.normalise = partial(normalise, spec=ImageSpec(image_size(vision), (0.5,) * 3, (0.5,) * 3))
    if config.engine.activation_checkpointing:
        checkpoint_blocks(encoder, random=False)  # tensors without data have no random state to come back to
    return encoder


def _fusion(config: Config, vision: PreTrainedModel) -> FusionEncoder:
    fusion, text, source = config.model.fusion, _tower_config("text", config), None
    if fusion.config is None:
        if fusion.source != "text":
            check_source("model.fusion.source", fusion.source)
        source = text if fusion.source == "text" else AutoConfig.from_pretrained(fusion.source)
        source = getattr(source, "text_config", source)
    widths = text.hidden_size, siglip.pooled_width(vision)
    return FusionEncoder(config_for(fusion, source, *widths, config.model.dropout))


def _tower(modality: Modality, config: Config) -> PreTrainedModel:
    """From its Hugging Face config alone; weights are never read."""
    key, fusion = f"model.{modality}", config.model.fusion
    found = _tower_config(modality, config)
    try:
        if modality == "text" and fusion is not None and fusion.source == "text":
            found.num_hidden_layers -= upper_layers(found, fusion.layers, key)
        with torch.device("meta"):
            return siglip.PaddedSiglipText(found) if found.model_type == siglip.TEXT else AutoModel.from_config(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{key}: its Hugging Face config could not be built: {one_line(error)}") from None


def _tower_config(modality: Modality, config: Config) -> PretrainedConfig:
    """Of the whole model, fusion layers included."""
    section = getattr(config.model, modality)
    key = f"model.{modality}"
    if (section.source is None) == (section.config is None):
        raise ValueError(f"{key}: expected exactly one of {key}.source and {key}.config, got neither or both")
    if section.source is not None:
        check_source(f"{key}.source", section.source)
    try:
        if section.source is not None:
            found = AutoConfig.from_pretrained(section.source)
            found = getattr(found, f"{modality}_config", found)
        else:
            options = dict(section.config) if modality == "vision" else _fitted(section)
            found = AutoConfig.for_model(options.pop("model_type"), **options)
        set_dropout(found, config.model.dropout)
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{key}: its Hugging Face config could not be built: {one_line(error)}") from None


def _fitted(text: TextConfig) -> dict:
    """Room for the tokenizer; one that is still to be trained takes at most `vocab_size` ids."""
    if text.tokenizer:
        check_source("model.text.tokenizer", text.tokenizer)
    size = len(load_tokenizer(text.tokenizer)) if text.tokenizer else text.vocab_size
    return {"max_position_embeddings": text.max_length + 2} | text.config | {"vocab_size": size}


def _without_memory(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers become fake ones, on the fake mode's device; floating ones in `dtype`."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kept)
