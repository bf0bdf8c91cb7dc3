"""Everything that a run needs before its first step: folder, tokenizer, image processor, model, teachers, stream."""

import json
import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from vlscale.config import dump
from vlscale.data.batch import Batch
from vlscale.data.images import ImageSpec, normalise
from vlscale.data.lanes import StreamState, choose_lanes
from vlscale.data.manifest import Manifest
from vlscale.data.samples import read_manifest
from vlscale.data.stream import TrainStream, open_train_corpus
from vlscale.data.teacher_cache import CacheHeader
from vlscale.data.tokens import train_tokenizer
from vlscale.distributed import Ranks, agreed_memory, gather_rows
from vlscale.logging import get_logger
from vlscale.models.checkpointing import checkpoint_blocks
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder, final_folder
from vlscale.models.hf_folder import load_image_processor, load_tokenizer, new_image_processor
from vlscale.models.masked_head import MaskedHead
from vlscale.models.teacher_heads import TeacherHeads
from vlscale.models.teachers import Teachers, build_teachers, check_not_constant
from vlscale.models.towers import check_room, fit_to_tokenizer, image_size
from vlscale.objectives.masked_language import Words
from vlscale.sections import Config, ObjectiveConfig, TrainConfig
from vlscale.train.agreed_stream import AgreedStream
from vlscale.train.cached_teachers import check_teacher_cache
from vlscale.train.comm import Comm
from vlscale.train.deepspeed_json import json_for_deepspeed
from vlscale.train.epochs import as_asked
from vlscale.train.frozen_teachers import TEACHERS, Stamp, check_same_teachers, live_stamp, stamp_text
from vlscale.train.inputs import Inputs
from vlscale.train.loss_terms import Widths, gathered_bytes

TOKENIZER = "tokenizer"  # folder in a run
CORPUS = "data.json"  # likewise a file: what it is trained on
TOKENIZER_SAMPLES = 100_000  # captions that a new tokenizer learns from: enough for any vocabulary that it may have
JUDGED_ROWS = 256  # of a teacher, over all ranks: as many as `check_not_constant` looks at


@dataclass
class Parts:
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    spec: ImageSpec
    model: DualEncoder
    teachers: Teachers | None
    inputs: Inputs
    manifest: Manifest
    comm: str  # how losses meet rows of other ranks: gather, ring or half_ring
    stamp: Stamp | None = None  # rank 0's, where there are teachers


def claim_folder(folder: Path, config: Config, parts: Parts) -> None:
    """Makes the run's folder, once all that can be wrong has been found right: first the tokenizer, what is trained on
    and by which teachers, and last the resolved `config.yaml`, which is what makes it a run. One rank does. `config`
    knows its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    parts.tokenizer.save_pretrained(folder / TOKENIZER)
    manifest = parts.manifest
    corpus = {"manifest": manifest.hash, "shards": len(manifest.urls), "samples": manifest.num_samples}
    if config.train.epochs is not None:
        corpus["steps"] = config.train.max_steps
    texts = {CORPUS: json.dumps(corpus) + "\n"}
    if parts.stamp is not None:
        texts[TEACHERS] = stamp_text(parts.stamp)
    for name, text in (texts | {"config.yaml": dump(as_asked(config))}).items():
        partial = folder / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, folder / name)


def check_sizes(config: Config) -> None:
    """What can be refused before any rank starts or anything is read."""
    if config.data.train is None:
        raise ValueError("data.train is not set: give the training shards, for example data.train='SHARDS/train-*.tar'")
    check_length(config.train)
    batch, size = config.train.global_batch_size, int(os.environ.get("WORLD_SIZE", 1))
    choose_lanes(batch, size, config.data.lanes)
    json_for_deepspeed(config, size)
    local, chunk = batch // size, config.train.chunk_size
    if chunk is not None and local % chunk:
        fits = [c for c in range(1, local + 1) if local % c == 0]
        raise ValueError(
            f"train.chunk_size={chunk} does not divide a rank's {local} pairs (train.global_batch_size={batch} over "
            f"{size} ranks); nearest that does: {min(fits, key=lambda c: abs(c - chunk))}"
        )


def check_length(train: TrainConfig) -> None:
    if train.max_steps is None and train.epochs is None:
        raise ValueError(
            "train.max_steps is not set: say how long the run is, for example train.max_steps=1000, or train.epochs=3 "
            "for passes over data.train"
        )


def build_stream(config: Config, parts: Parts, ranks: Ranks, state: StreamState | None) -> TrainStream | AgreedStream:
    """The rank's batches, from the beginning or after the one whose `state` is given."""
    stream = TrainStream(
        config.data,
        parts.spec,
        parts.tokenizer,
        global_batch_size=config.train.global_batch_size,
        max_length=config.model.text.max_length,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        second_view=config.objective.view_weight > 0,
        second_caption=config.objective.caption_weight > 0,
        teacher_cache=config.teacher_cache,
        state=state,
        device=ranks.device,
        manifest=parts.manifest,
    )
    return AgreedStream(stream, ranks) if config.data.unreadable_shards == "quarantine" else stream


def build_probe(config: Config, parts: Parts, ranks: Ranks) -> Batch | None:
    """This rank's part of the run's first global batch, where diagnostics are asked for."""
    if config.log.diagnostics_every is None:
        return None
    with closing(iter(build_stream(config, parts, ranks, state=None))) as batches:
        return next(batches)


def check_teachers(parts: Parts, objective: ObjectiveConfig, batch: Batch, ranks: Ranks) -> None:
    """Raises the same ValueError on every rank when a teacher's relations in the global batch say nothing, and warns of
    one whose relations say little. `batch`: this rank's part."""
    rows = dict(zip(("image", "text"), parts.inputs.teacher_rows(batch, objective.teachers_seen), strict=True))
    each = -(-JUDGED_ROWS // ranks.size)
    rows = {name: gather_rows(own[:each].float(), ranks) for name, own in rows.items() if own is not None}
    judged, fault = {}, None
    if ranks.first:
        try:
            judged = {name: check_not_constant(own, f"teacher.{name}", objective) for name, own in rows.items()}
        except ValueError as error:
            fault = str(error)
    fault = ranks.from_first(fault)
    if fault is not None:
        raise ValueError(fault)
    for name, found in judged.items():
        if found is not None and found.weak:
            leave_out = f", or set objective.relation_weight_{name}=0" if objective.name == "covlr" else ""
            get_logger().warning(
                "teacher.%s hardly tells samples apart: %s; give a trained teacher with its own preprocessing%s",
                name, found, leave_out,
            )  # fmt: skip


def check_same_data(manifest: Manifest, ranks: Ranks) -> None:
    """Every rank must see the same shards, or the global batches would not be what the seed says."""
    hashes = ranks.gather_objects(manifest.hash)
    other = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
    if other:
        raise ValueError(
            f"data.train: rank {', '.join(map(str, other))} see other shards than rank 0: manifest {hashes[other[0]]}, "
            f"expected {hashes[0]}; give every machine the same files"
        )


def check_begun_data(manifest: Manifest, begun: Path, ranks: Ranks) -> None:
    """A run that starts anew in a folder in which it had `begun` must see the same shards too. A checkpoint knows its
    own."""
    before = ranks.from_first(corpus_of(begun) if ranks.first else None)
    if before and before["manifest"] != manifest.hash:
        raise ValueError(
            f"cannot resume: the shards (their manifest) changed, {begun} began with {before['shards']} shards and "
            f"{before['samples']} samples, this run has {len(manifest.urls)} and {manifest.num_samples}; put them "
            "back, start a new run in another folder, or set data.changed_shards=next_epoch"
        )


def corpus_of(folder: Path) -> dict | None:
    """What the run in `folder` trains on. None where there is no run yet, or what it says of itself was lost with the
    power."""
    try:
        return json.loads((folder / CORPUS).read_text())
    except (FileNotFoundError, ValueError):
        return None


def build_parts(config: Config, folder: Path, ranks: Ranks, manifest: Manifest | None = None) -> Parts:
    """The same on every rank: weights are drawn from `train.seed`. `manifest`: of data.train, where it is open."""
    manifest = manifest or open_train_corpus(config.data, ranks.rank, ranks.size)
    header = check_teacher_cache(config, manifest, ranks)
    tokenizer = build_tokenizer(config, folder, manifest, ranks)
    tokenizer.model_max_length = config.model.text.max_length  # so that `final/` cuts where training did
    if config.model.text.config is not None:
        text = config.model.text
        fitted = text.model_copy(update={"config": fit_to_tokenizer(text.config, tokenizer, text.max_length)})
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": fitted})})
    torch.manual_seed(config.train.seed)
    model = build_dual_encoder(config.model, sigmoid=config.objective.loss == "sigmoid")
    if config.meta_mode == "heads" and model.is_siglip:
        raise ValueError("meta.mode=heads moves the projections, and SigLIP has none; set meta.mode=first_order")
    check_room(model.text_model, config.model.text.max_length)
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model)
    processor = _image_processor(config, model)
    spec = ImageSpec.from_processor(processor)
    if config.data.decode == "device":
        _check_resample(spec, "the image processor")
    model.normalise = partial(normalise, spec=spec)
    teachers = None
    if config.objective.needs_teachers:
        teachers = build_teachers(config.teacher, model, projected=config.model.init_from is not None)
    if config.objective.name == "rvlr" and config.objective.needs_teachers:
        model.teacher_heads = TeacherHeads(*_teacher_widths(header or teachers), config.model.embed_dim)
        if model.fusion is None:
            get_logger().info("objective.itm_weight is 0: matching needs a fusion encoder, and the model has none")
    words = None
    if config.objective.mlm_weight > 0:
        words = Words.of(tokenizer)
        model.masked_head = MaskedHead(model.fusion.width, words.size)
    if model.fusion is not None and not config.objective.fuses:
        get_logger().info("no objective has a weight that looks at the fusion encoder: it stays as it is")
    comm = decide_comm(config, model, header or teachers, ranks)
    if config.why_joint:
        get_logger().warning("meta.mode=%s trains as joint: %s", config.meta.mode, config.why_joint)
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    stamp = _same_teachers(config, header or teachers, spec, folder, ranks)
    if teachers is not None:
        for teacher in (teachers.image, teachers.text):
            teacher.to(ranks.device, dtype)
    fuses = model.fusion is not None
    inputs = Inputs(
        spec,
        tokenizer,
        teachers,
        ranks.device,
        config.model.text.max_length,
        dtype,
        fuses,
        words,
        config.train.chunk_size,
    )
    if config.data.decode == "device":
        _check_resample(inputs.teacher_spec, "the image teacher's processor")
    torch.manual_seed(config.train.seed * 1000 + ranks.rank)  # dropout differs between ranks
    return Parts(tokenizer, processor, spec, model, teachers, inputs, manifest, comm, stamp)


def decide_comm(config: Config, model: DualEncoder, teachers: Teachers | CacheHeader | None, ranks: Ranks) -> str:
    """gather, ring or half_ring, the same on every rank; the log says what `auto` takes and why."""
    if ranks.size == 1:
        return "gather"
    size = 2 if config.engine.dtype == "bf16" else 4
    fused = None if model.fusion is None else model.fusion.width
    widths = Widths(config.model.embed_dim, *_teacher_widths(teachers), fused)
    gathered = gathered_bytes(config.objective, widths, config.train.global_batch_size, size)
    comm = Comm(config.engine.comm, gathered, agreed_memory(ranks))
    if comm.asked == "auto":
        get_logger().info("engine.comm=auto: %s", comm)
    for what in gathered_anyway(config, comm.way):
        get_logger().info("engine.comm=%s: %s, whose embeddings are gathered all the same", comm.asked, what)
    return comm.way


def gathered_anyway(config: Config, way: str) -> list[str]:
    """What needs the rows of all ranks at once, where the others go round in a ring."""
    o, found = config.objective, []
    if way == "gather":
        return found
    if config.meta_mode == "heads":
        found.append("meta.mode=heads differentiates the contrastive loss twice")
    if o.name == "rvlr" and o.distils and o.relation_distance == "wasserstein":
        found.append("objective.relation_distance=wasserstein sorts whole rows of relations")
    if config.model.fusion is not None and o.matching_weight > 0:
        found.append("objective.itm_weight draws negatives among all pairs")
    return found


def _check_resample(spec: ImageSpec, whose: str) -> None:
    if spec.resample not in (2, 3):
        raise ValueError(
            f"data.decode=device resizes bilinearly or bicubically, and {whose} says resample={spec.resample}; "
            "expected 2 or 3 there, or data.decode=pil"
        )


def _teacher_widths(teachers: Teachers | CacheHeader | None) -> tuple[int, int]:
    """Of its image and its text embeddings; (0, 0) where there are none."""
    return (0, 0) if teachers is None else (teachers.image.width, teachers.text.width)


def _same_teachers(
    config: Config, teachers: Teachers | CacheHeader | None, spec: ImageSpec, folder: Path, ranks: Ranks
) -> Stamp | None:
    """Which teachers these are, found by rank 0 alone; None elsewhere, and without teachers. Raises the same ValueError
    on every rank where the run in `folder` began with others."""
    stamp = fault = None
    if teachers is not None and ranks.first:
        try:
            if isinstance(teachers, CacheHeader):
                stamp = {"image": teachers.image, "text": teachers.text}
            else:
                stamp = live_stamp(config.teacher, teachers, spec)
            check_same_teachers(stamp, config.teacher, folder)
        except ValueError as error:
            fault = str(error)
    fault = ranks.from_first(fault)
    if fault is not None:
        raise ValueError(fault)
    return stamp


def build_tokenizer(config: Config, folder: Path, manifest: Manifest, ranks: Ranks) -> PreTrainedTokenizerBase:
    """The one that this run began with, or the named one, or the starting point's, or one trained on the captions."""
    text, started = config.model.text, (folder / "config.yaml").is_file() and (folder / TOKENIZER).is_dir()
    own = str(folder / TOKENIZER) if started else None
    source = own or text.tokenizer or (config.model.init_from and final_folder(config.model.init_from)) or text.source
    if source is not None:
        return load_tokenizer(source)
    tokenizer = None
    if ranks.first:
        get_logger().info("training a tokenizer on the captions of data.train")
        samples = islice(read_manifest(manifest, config.data), TOKENIZER_SAMPLES)
        captions = (caption for sample in samples for caption in sample.captions)
        tokenizer = train_tokenizer(captions, text.vocab_size, text.max_length)
    return ranks.from_first(tokenizer)


def _image_processor(config: Config, model: DualEncoder) -> BaseImageProcessor:
    """The starting point's own; for a tower from scratch, one of the tower's size."""
    vision = config.model.vision
    source = (config.model.init_from and final_folder(config.model.init_from)) or vision.source
    if source is None:
        return new_image_processor(image_size(model.vision_model), vision.mean, vision.std)
    return load_image_processor(source)
