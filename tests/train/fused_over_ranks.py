"""What the ranks of a test run: the gradient of a small model with a fusion encoder, under every term that it has.

The truth is one process's: towers once, all N^2 similarities, a softmax and its cumulative sum for each row, one fusion
forward a kind of pair. No tests here. N pairs in all, W ranks.
"""

import functools
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from tests.objectives.over_ranks import averaged
from vlscale.data.batch import Batch
from vlscale.data.images import ImageSpec, normalise
from vlscale.data.keyed import hash64, uniforms
from vlscale.distributed import Ranks, count_traffic, plan_exchange
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder
from vlscale.models.masked_head import MaskedHead
from vlscale.models.teacher_heads import TeacherHeads
from vlscale.objectives.masked_language import Words, mask_words
from vlscale.objectives.matching import Rows, hard_negatives
from vlscale.objectives.total import total_loss
from vlscale.sections import MetaConfig, ModelConfig, ObjectiveConfig
from vlscale.train.inputs import Inputs
from vlscale.train.step import StepParts, embed

N, SIDE, LENGTH, WORDS, D, SEED, NUMBER = 16, 16, 9, 40, 8, 3, 11
SPEC = ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3, 3)
SPECIAL = torch.arange(4).numpy()
TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
WORDS_OF = Words(WORDS, 1, SPECIAL)
OFFICIAL = {"iic_weight": 1, "ttc_weight": 2, "kd_weight": 2, "kd_image_weight": 1, "kd_text_weight": 1}


@dataclass(frozen=True)
class Case:
    name: str
    objective: dict = field(hash=False)
    chunks: int = 1
    dtype: torch.dtype = torch.float64
    comm: str = "auto"

    def __str__(self) -> str:
        return f"{self.name} {self.comm} {self.chunks} chunks {str(self.dtype).removeprefix('torch.')}"

    @property
    def of(self) -> ObjectiveConfig:
        return ObjectiveConfig.model_validate(self.objective)


RVLR = {"name": "rvlr", "itm_weight": 2, **OFFICIAL}
EVERYTHING = RVLR | {"relation_distance": "kl", "mlm_weight": 0.7, "mlm_probability": 0.3}
EVERYTHING |= {"view_weight": 0.4, "caption_weight": 0.5}
KINDS = {
    "itm": {"contrastive_weight": 0.3, "itm_weight": 1.5},
    "itm sigmoid": {"loss": "sigmoid"},
    "mlm": {"mlm_weight": 1, "itm_weight": 0, "mlm_probability": 0.4},
    **{f"rvlr {kind}": RVLR | {"relation_distance": kind} for kind in ("mae", "mse", "wasserstein")},
    "everything": EVERYTHING,
    "two views": {"contrastive_weight": 0, "itm_weight": 0, "view_weight": 1, "caption_weight": 0.6},  # without fusion
}
CASES = [Case(name, own) for name, own in KINDS.items()]
CASES += [Case(name, KINDS[name], 4) for name in ("itm", "mlm", "everything")]
CASES += [
    Case(name, own, chunks, torch.float32, comm)
    for name, own in KINDS.items()
    for comm in ("gather", "ring", "half_ring")
    for chunks in (1, 4)
]


def model(sigmoid: bool, dtype: torch.dtype) -> DualEncoder:
    torch.manual_seed(0)
    # Key biases have a true gradient of zero. At twice this range an attention's own rounding in float32 is above the
    # bound for them, in one process too, whatever the loss.
    bert = TOWER | {"model_type": "bert", "vocab_size": WORDS, "num_hidden_layers": 2, "initializer_range": 0.1}
    vit = TOWER | {"model_type": "vit", "image_size": SIDE, "patch_size": 8, "num_hidden_layers": 1, "hidden_size": 24}
    given = {"embed_dim": D, "dropout": 0.0, "logit_bias_init": -2.0, "fusion": {"source": "text"}}
    towers = {"vision": {"config": vit}, "text": {"config": bert | {"max_position_embeddings": LENGTH + 2}}}
    encoder = build_dual_encoder(ModelConfig.model_validate(given | towers), sigmoid)
    encoder.normalise = functools.partial(normalise, spec=SPEC)
    encoder.teacher_heads = TeacherHeads(6, 5, D)
    encoder.masked_head = MaskedHead(encoder.fusion.width, WORDS)
    return encoder.to(dtype).eval()


@functools.cache
def whole_batch() -> Batch:
    """Captions of many lengths, so that ranks pad differently; some pairs share an id."""
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randint, generator=generator)
    lengths = torch.linspace(4, LENGTH, N).long()
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    unit = functools.partial(F.normalize, dim=1)
    return Batch(
        keys=[str(place) for place in range(N)],
        captions=[""] * N,
        positions=torch.arange(N),
        pair_id=torch.arange(N) * 7 % 13,
        images=draw(0, 256, (N, 3, SIDE, SIDE)).byte(),
        input_ids=draw(4, WORDS, (N, LENGTH)) * mask,
        attention_mask=mask,
        second_images=draw(0, 256, (N, 3, SIDE, SIDE)).byte(),
        second_input_ids=draw(4, WORDS, (N, 4)),
        second_attention_mask=torch.ones(N, 4, dtype=torch.long),
        state=None,
        epoch=0.0,
        skipped=0,
        teacher_image=unit(torch.randn(N, 6, generator=generator)),
        teacher_text=unit(torch.randn(N, 5, generator=generator)),
    )


def part_of(batch: Batch, ranks: Ranks, objective: ObjectiveConfig) -> Batch:
    """A rank's rows, its captions cut to the longest of them, and what second views the objective looks at."""
    rows = slice(ranks.rank * N // ranks.size, (ranks.rank + 1) * N // ranks.size)
    own = {name: value[rows] for name, value in vars(batch).items() if torch.is_tensor(value) or name == "keys"}
    longest = int(own["attention_mask"].sum(1).max())
    own |= {name: own[name][:, :longest] for name in ("input_ids", "attention_mask")}
    if not objective.caption_weight:
        own |= {"second_input_ids": None, "second_attention_mask": None}
    if not objective.view_weight:
        own |= {"second_images": None}
    return replace(batch, **own)


def step_parts(case: Case, ranks: Ranks) -> StepParts:
    inputs = Inputs(SPEC, None, None, ranks.device, LENGTH, case.dtype, fuses=True, words=WORDS_OF)
    chunk = None if case.chunks == 1 else N // ranks.size // case.chunks
    return StepParts(None, inputs, case.of, MetaConfig(), ranks, chunk).at(SEED, NUMBER)


def gradient(case: Case, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The loss, its parts, and each parameter's gradient after the average that an engine makes."""
    encoder = model(case.of.loss == "sigmoid", case.dtype).to(ranks.device)
    batch = part_of(whole_batch(), ranks, case.of)
    loss, metrics = total_loss(embed(encoder, step_parts(case, ranks), batch), case.of, ranks, case.comm)
    loss.backward()
    return {"loss": loss.detach(), "metrics": metrics} | averaged(dict(encoder.named_parameters()), ranks)


def truth(case: Case) -> dict[str, torch.Tensor]:
    """The same by one process, plainly."""
    batch = whole_batch()
    encoder, o = model(case.of.loss == "sigmoid", torch.float64), case.of.model_copy(update={"impl": "reference"})
    alone = case.objective | {"itm_weight": 0, "mlm_weight": 0}
    parts = step_parts(replace(case, objective=alone, chunks=1, dtype=torch.float64), Ranks())
    rows = embed(encoder, parts, part_of(batch, Ranks(), o))
    vision = encoder.vision_model(normalise(batch.images, SPEC).double()).last_hidden_state
    text = encoder.text_model(batch.input_ids, batch.attention_mask).last_hidden_state
    fused = encoder.fusion(text, batch.attention_mask, vision)
    rows = replace(rows, fused=F.normalize(fused[:, 0], dim=1), masked=torch.zeros(1))
    loss, _ = total_loss(rows, o.model_copy(update={"itm_weight": 0, "mlm_weight": 0}), Ranks())
    if o.matching_weight:
        picture, caption = plain_negatives(rows.image, rows.text, rows.logit_scale, batch.pair_id)
        met = [fused, encoder.fusion(text, batch.attention_mask, vision[picture])]
        met.append(encoder.fusion(text[caption], batch.attention_mask[caption], vision))
        logits = encoder.fusion.matching(torch.cat([tokens[:, 0] for tokens in met]))
        loss = loss + o.matching_weight * F.cross_entropy(logits, (torch.arange(3 * N) < N).long())
    if o.mlm_weight:
        loss = loss + o.mlm_weight * plain_masked(encoder, vision, batch, o.mlm_probability)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@torch.no_grad()
def plain_negatives(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampler as one would write it: all similarities, a softmax, its cumulative sum, the first place above u."""
    key = hash64(SEED, "fusing", NUMBER)
    logits = scale * image @ text.T
    logits = logits.masked_fill(ids[:, None] == ids[None, :], -torch.inf).double()
    found = []
    for side, rows in (("picture", logits.T), ("caption", logits)):
        levels = torch.from_numpy(uniforms(hash64(key, side), len(ids)))
        above = rows.softmax(1).cumsum(1) > levels[:, None]
        found.append(above.double().argmax(1))
    return found[0], found[1]


def plain_masked(encoder: DualEncoder, vision: torch.Tensor, batch: Batch, probability: float) -> torch.Tensor:
    key = hash64(SEED, "fusing", NUMBER)
    where = (batch.positions, WORDS_OF, probability, key, torch.device("cpu"))
    masked = mask_words(batch.input_ids, batch.attention_mask, *where)
    text = encoder.text_model(masked.input_ids, batch.attention_mask).last_hidden_state
    fused, head = encoder.fusion(text, batch.attention_mask, vision), encoder.masked_head
    scores = head.scores(head.transform(fused))
    asked = torch.full_like(batch.input_ids, -100)
    asked.view(-1)[masked.places] = masked.words
    return F.cross_entropy(scores.transpose(1, 2), asked)


def draws(ranks: Ranks, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The hard negatives that this rank finds among `count` pairs of random embeddings."""
    image, text, ids = many(count)
    rows = slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)
    sides = (Rows(emb[rows].to(ranks.device), ids[rows].to(ranks.device)) for emb in (image, text))
    key = hash64(SEED, "fusing", NUMBER)
    scale = torch.tensor(8.0, device=ranks.device)
    return hard_negatives(*sides, torch.arange(count)[rows], scale, key, ranks)


def many(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    image, text = (F.normalize(torch.randn(count, D, generator=generator), dim=1) for _ in range(2))
    return image, text, torch.arange(count) * 31 % (count * 3 // 4)


def exchanged(ranks: Ranks) -> dict[str, object]:
    """Rows by place, their gradients, and the bytes that came: three rows of 5 float64 a rank, four asked for."""
    generator = torch.Generator().manual_seed(6)
    everyone = torch.randn(3 * ranks.size, 5, generator=generator, dtype=torch.float64)
    wanted = torch.randint(0, len(everyone), (ranks.size, 4), generator=generator)
    own = everyone[3 * ranks.rank :][:3].to(ranks.device, copy=True).requires_grad_()
    plan = plan_exchange(wanted[ranks.rank].to(ranks.device), 3, ranks)
    with count_traffic() as traffic:
        found = plan(own)
        weight = torch.arange(1.0, 5.0, dtype=torch.float64, device=ranks.device)[:, None] * (ranks.rank + 1)
        (grad,) = torch.autograd.grad((found * weight).square().sum(), own, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), own)
    away = int((wanted[ranks.rank] // 3 != ranks.rank).sum())
    asked = int((wanted[torch.arange(ranks.size) != ranks.rank] // 3 == ranks.rank).sum())
    return {
        "found": found.detach(), "grad": grad.detach(), "second": second, "bytes": traffic["all_to_all"],
        "rows": (away, asked), "wanted": wanted, "everyone": everyone,
    }  # fmt: skip


def refused(ranks: Ranks) -> str:
    """What this rank is told when all pairs share an id."""
    unit = F.normalize(torch.randn(2, D), dim=1).to(ranks.device)
    rows, scale = Rows(unit, torch.full((2,), 5, device=ranks.device)), torch.tensor(1.0, device=ranks.device)
    try:
        hard_negatives(rows, rows, torch.arange(2) + 2 * ranks.rank, scale, 0, ranks)
    except ValueError as error:
        return str(error)
    return "accepted"


def on_rank(ranks: Ranks) -> dict[str, object]:
    return {
        "cases": {str(case): gradient(case, ranks) for case in CASES},
        "draws": draws(ranks, 2400),
        "exchanged": exchanged(ranks),
        "refused": refused(ranks),
    }
