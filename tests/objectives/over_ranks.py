"""What the ranks of a test run: a small model's gradient under every form of every objective. No tests here.

W ranks, N pairs in all. The model is given in float64, the truth is one process's dense loss in float64.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from vlscale.kernels.checks import available_impls

from tests.objectives.costs_over_ranks import costs, costs_of_matching
from vlscale.distributed import Block, Gather, HalfRing, Ranks, Ring, mean_over_ranks
from vlscale.models.chunks import in_chunks
from vlscale.objectives.sharded_contrastive import sharded_contrastive_loss
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss
from vlscale.objectives.sharded_relation_match import sharded_relation_match_loss
from vlscale.objectives.sharded_sigmoid import sharded_sigmoid_loss
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import ObjectiveConfig

N, FEATURES, D, D_TEACHER = 48, 12, 8, 6
IDS = torch.arange(N) * 7 % 13


@dataclass(frozen=True)
class Case:
    objective: str
    comm: str = "gather"
    ids: bool = False
    chunks: int = 1
    dtype: torch.dtype = torch.float64
    spread: float = 1.0  # of the embeddings' norms: far from 1, one reference does not reach
    impl: str = "chunked"
    settings: tuple[tuple[str, str], ...] = field(default=())
    locked: tuple[str, ...] = ()  # parts of the model that do not learn

    def __str__(self) -> str:
        words = [self.objective, *(value for _, value in self.settings), *(f"locked_{part}" for part in self.locked)]
        words += [self.comm, f"{self.chunks}chunks"]
        words += [
            str(self.dtype)[6:],
            *(["ids"] if self.ids else []),
            *([f"spread{self.spread:g}"] if self.spread != 1 else []),
        ]
        return "-".join(words + ([self.impl] if self.impl != "chunked" else []))


RELATIONS = [
    ("relation_kl", (("scope", "row"), ("relation", "cosine"))),
    ("relation_kl", (("scope", "matrix"), ("relation", "cosine"))),
    ("relation_kl", (("scope", "row"), ("relation", "euclidean"))),
    ("relation_match", (("metric", "mae"),)),
    ("relation_match", (("metric", "mse"),)),
    ("relation_match", (("metric", "wasserstein"),)),
    ("relation_kl", (("scope", "matrix"), ("relation", "euclidean"))),
]
DISTANCES = [("rvlr", distance) for distance in ("mae", "mse", "kl", "wasserstein")]
DISTANCES += [("rvlr_cross", distance) for distance in ("mae", "mse")]  # also of the image-text matrix
COMMS = ("gather", "ring", "half_ring")
PRECISIONS = [(torch.float64, 1), (torch.float32, 1), (torch.float32, 4)]  # dtype and chunks
CASES = [
    Case(objective, comm, ids, chunks, dtype)
    for objective in ("contrastive", "sigmoid")
    for comm in ("gather", "ring")
    for ids in (False, True)
    for dtype, chunks in PRECISIONS
]
CASES += [
    Case(objective, comm, chunks=chunks, dtype=dtype, settings=settings)
    for objective, settings in RELATIONS
    for comm in COMMS
    for dtype, chunks in PRECISIONS
]
CASES += [
    Case(objective, comm, True, chunks, torch.float32, settings=(("relation_distance", distance),))
    for objective, distance in DISTANCES
    for comm in COMMS
    for chunks in (1, 4)
]
# Sums of terms as a config says them: second views, with pairs or, as teachers are trained, without; frozen teachers.
SUMS = [(name, (("loss", loss),), ()) for name in ("views", "views_alone") for loss in ("softmax", "sigmoid")]
SUMS += [("covlr", (("conflict", rule),), ()) for rule in ("keep", "scale", "project")]
SUMS += [("rvlr", (("relation_distance", distance),), ("teachers",)) for distance in ("mae", "kl")]
FROZEN = [(objective, settings, ("teachers",)) for objective, settings in RELATIONS]  # whose mixture's weights learn
LOCKED = [(objective, (), (tower,)) for objective in ("contrastive", "sigmoid") for tower in ("image", "text")]
CASES += [
    Case(objective, comm, True, chunks, torch.float32, settings=settings, locked=locked)
    for objective, settings, locked in SUMS + FROZEN + LOCKED
    for comm in (COMMS[:2] if objective in ("contrastive", "sigmoid") else COMMS)
    for chunks in (1, 4)
]
CASES += [Case("contrastive", comm, ids, spread=20.0) for comm in ("gather", "ring") for ids in (False, True)]
CASES += [
    Case("relation_kl", comm, spread=20.0, settings=(("scope", scope), ("relation", "cosine")))
    for comm in COMMS
    for scope in ("row", "matrix")
]
CASES += [Case(objective, ids=True, impl="reference") for objective in ("contrastive", "sigmoid")]
CASES += [Case(objective, impl="reference", settings=settings) for objective, settings in RELATIONS[::3]]
CASES += [Case("relation_kl", "auto"), Case("contrastive", "half_ring")]
TRITON = [
    Case(objective, comm, ids, dtype=torch.float32, spread=spread, impl="triton")
    for objective, spread in (("contrastive", 1.0), ("contrastive", 6.0), ("sigmoid", 1.0))
    for comm in ("gather", "ring")
    for ids in (False, True)
]
TRITON += [
    Case(objective, comm, dtype=torch.float32, spread=spread, impl="triton", settings=RELATIONS[which][1])
    for objective, which, comm, spread in (
        ("relation_kl", 0, "gather", 1.0),
        ("relation_kl", 0, "half_ring", 1.0),
        ("relation_kl", 0, "half_ring", 6.0),
        ("relation_kl", 1, "half_ring", 1.0),
        ("relation_kl", 1, "half_ring", 6.0),
        ("relation_kl", 1, "ring", 6.0),
        ("relation_kl", 2, "ring", 1.0),
        ("relation_match", 3, "ring", 1.0),
        ("relation_match", 3, "half_ring", 1.0),
    )
]


RVLR = {"iic_weight": 1, "ttc_weight": 2, "kd_weight": 2, "kd_image_weight": 1, "kd_text_weight": 0.7, "name": "rvlr"}
TOTALS = {  # by objective, what a config would say
    "views": {"view_weight": 0.7, "caption_weight": 0.4},
    "views_alone": {"contrastive_weight": 0, "view_weight": 1, "caption_weight": 1},
    "covlr": {"name": "covlr", "relation_weight_image": 2, "relation_weight_text": 0.7, "teacher_temperature": 0.02},
    "rvlr": RVLR,
    "rvlr_cross": RVLR | {"cross_modal_relation": True},
}


class Small(nn.Module):
    """Two towers, two trainable teachers, and every scalar that an objective may learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tower = lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, D))  # noqa: E731
        self.image, self.text = tower(), tower()
        self.teachers = nn.ModuleList(nn.Linear(FEATURES, width) for width in (D_TEACHER, D))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(14.3).log()), nn.Parameter(torch.tensor(-3.0))
        self.teacher_weights = nn.Parameter(torch.tensor([0.7, 0.4]))
        self.taus = nn.Parameter(torch.tensor([0.2, 0.1]))

    def forward(self, inputs: torch.Tensor, ids: torch.Tensor, case: Case, ranks: Ranks) -> torch.Tensor:
        """The loss of all ranks' rows; `inputs` (2, b, FEATURES), `ids` (b,) are this rank's. A second view of a
        picture is what the other tower sees of it."""
        for part in case.locked:
            getattr(self, part).requires_grad_(False)
        chunk = len(ids) // case.chunks if case.chunks > 1 else None
        unit = lambda tower: lambda rows: case.spread * F.normalize(tower(rows), dim=1)  # noqa: E731
        seen = torch.cat([inputs, inputs.flip(0)], 1) if case.objective.startswith("views") else inputs
        image, text = (in_chunks(unit(t), chunk, rows) for t, rows in zip((self.image, self.text), seen, strict=True))
        how = {"ranks": ranks, "comm": case.comm, "impl": case.impl}
        pair_id = ids if case.ids else None
        if case.objective == "contrastive":
            return sharded_contrastive_loss(image, text, self.log_scale.exp(), pair_id=pair_id, **how)
        if case.objective == "sigmoid":
            return sharded_sigmoid_loss(image, text, self.log_scale.exp(), self.bias, pair_id=pair_id, **how)
        teachers = [unit(teacher)(inputs[0]) for teacher in self.teachers]
        settings = dict(case.settings)
        if case.objective in TOTALS:
            return self.total(image, text, teachers, ids, case, ranks)
        if case.objective == "relation_match":
            tau = self.taus[0]
            return sharded_relation_match_loss(
                image, teachers, self.teacher_weights, temperature=tau, **settings, **how
            )
        taus = {"student_temperature": self.taus[0], "teacher_temperature": self.taus[1]}
        return sharded_relation_kl_loss(
            image, teachers, teacher_weights=self.teacher_weights, **taus, **settings, **how
        )

    def total(self, image, text, teachers: list[torch.Tensor], ids, case: Case, ranks: Ranks) -> torch.Tensor:
        """Every term but those of a fusion encoder; what the second teacher says also serves as the projections.
        CoVLR's teachers are frozen, want each modality away from the other, and its neighbours nearer than contrast
        does: gradients conflict."""
        o = ObjectiveConfig(impl=case.impl, **TOTALS[case.objective], **dict(case.settings))
        (image, *second_image), (text, *second_text) = image.split(len(ids)), text.split(len(ids))
        if o.name == "covlr":
            teachers = [F.normalize(a - 0.3 * b, dim=1).detach() for a, b in ((image, text), (text, image))]
        rows = Embedded(
            image, text, self.log_scale.exp(), self.bias if o.loss == "sigmoid" else None, ids,
            *second_image, *second_text, teacher_image=teachers[0], teacher_text=teachers[1],
            projected_teacher_image=teachers[1], projected_teacher_text=teachers[1], text_share=self.teacher_weights[0],
        )  # fmt: skip
        return total_loss(rows, o, ranks, case.comm)[0]


def inputs_of(rows: slice = slice(0, N)) -> tuple[torch.Tensor, torch.Tensor]:
    """((2, b, FEATURES) float64, (b,) ids) of some of the N pairs; numbers of float32, the same in both dtypes."""
    return torch.randn(2, N, FEATURES, generator=torch.Generator().manual_seed(1)).double()[:, rows], IDS[rows]


def own_inputs(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """`inputs_of` this rank, on its device."""
    b = N // ranks.size
    inputs, ids = inputs_of(slice(ranks.rank * b, (ranks.rank + 1) * b))
    return inputs.to(ranks.device), ids.to(ranks.device)


def gradient(case: Case, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The loss, and each parameter's gradient after the average that an engine makes."""
    model = Small().to(ranks.device, case.dtype)
    inputs, ids = own_inputs(ranks)
    loss = model(inputs.to(case.dtype), ids, case, ranks)
    loss.backward()
    return {"loss": loss.detach()} | averaged(dict(model.named_parameters()), ranks)


def averaged(parameters: dict[str, nn.Parameter], ranks: Ranks) -> dict[str, torch.Tensor]:
    """The gradients that there are, averaged over ranks in one go."""
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    flat = ranks.sum(torch.cat([grad.flatten() for grad in grads.values()])) / ranks.size
    parts = flat.split([grad.numel() for grad in grads.values()])
    return {name: part.view_as(grad) for (name, grad), part in zip(grads.items(), parts, strict=True)}


def meta_gradient(case: Case, later: Case, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gradient of L(t) + 0.5 L_later(t - 0.3 grad L(t)), the inner gradient averaged over ranks and differentiated."""
    model = Small().to(ranks.device).double()
    inputs, ids = own_inputs(ranks)
    parameters = dict(model.named_parameters())
    inner = model(inputs, ids, case, ranks)
    grads = torch.autograd.grad(inner, list(parameters.values()), create_graph=True, allow_unused=True)
    moved = {
        name: p if grad is None else p - 0.3 * mean_over_ranks(grad, ranks)
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
    }
    loss = inner + 0.5 * functional_call(model, moved, (inputs, ids, later, ranks))
    loss.backward()
    return {"loss": loss.detach()} | averaged(parameters, ranks)


META = [
    (Case("contrastive", ids=ids, impl=impl), Case("relation_kl", comm))
    for ids, comm, impl in ((False, "gather", "chunked"), (True, "half_ring", "chunked"), (True, "ring", "reference"))
]
META += [(Case("sigmoid", ids=ids), Case("relation_kl")) for ids in (False, True)]


def meetings(way, rows: int, ranks: Ranks) -> torch.Tensor:
    """(W b, W b) how often row i met column j, and whether the columns' sums came home to the right owner."""
    everyone = torch.zeros(ranks.size * rows, ranks.size * rows, dtype=torch.int64, device=ranks.device)
    first = ranks.rank * rows
    own = torch.arange(first, first + rows, device=ranks.device)

    def visit(block: Block):
        assert block.held[0].tolist() == list(range(block.columns.start, block.columns.stop))
        assert (block.riding[0] == -block.held[0]).all()
        mine = own[block.rows]
        everyone[mine[:, None], block.held[0]] += 1
        if block.role == "triangle":
            return []
        assert block.offset is None or block.offset == first - block.columns.start
        return [block.held[0] * len(mine)]

    held = way(ranks).hold(own)
    (home,) = way(ranks).sweep(held, [-own], visit)
    everyone = ranks.sum(everyone)
    visits = everyone[:, own].sum(0) - (rows if way is HalfRing else 0)
    assert home.tolist() == (own * visits).tolist()
    return everyone


def one_row_each(ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's gradient, times 1 / W, where it has a single row: half a block is then no row at all."""
    row = inputs_of(slice(ranks.rank, ranks.rank + 1))[0].to(ranks.device)
    found = {}
    for comm in COMMS:
        x, z = (part.clone().requires_grad_() for part in row)
        loss = relation(x, ranks, teacher=z, comm=comm)
        loss = loss + sharded_relation_match_loss(x, [z], [0.7], temperature=1.0, ranks=ranks, comm=comm)
        loss.backward()
        found[comm] = torch.stack([x.grad, z.grad]) / ranks.size
    return found


def refusals(ranks: Ranks) -> dict[str, str]:
    """What this rank is told where the ranks disagree, or ask for a derivative that there is not."""
    odd = ranks.rank == 1
    rows = F.normalize(torch.randn(4, D), dim=1).to(ranks.device).requires_grad_()
    more = torch.cat([rows, rows[:1]])
    attempts = {
        "uneven": lambda: sharded_contrastive_loss(more if odd else rows, more if odd else rows, 10.0, ranks=ranks),
        "empty": lambda: sharded_sigmoid_loss(
            rows[:0] if odd else rows, rows[:0] if odd else rows, 1.0, 0.0, ranks=ranks
        ),
        "argument": lambda: relation(rows, ranks, student_temperature=-1.0 if odd else 1.0),
        "unlike": lambda: relation(rows, ranks, scope="matrix" if odd else "row"),
        "everyone": lambda: sharded_contrastive_loss(rows, rows, 10.0, ranks=ranks, comm="torus"),
        "ring twice": lambda: derivative(rows, 2, ranks, "ring"),
        "third": lambda: derivative(rows, 3, ranks, "gather"),
        "sigmoid in a ring twice": lambda: derivative(rows, 2, ranks, "ring", sigmoid=True),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "accepted"
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def relation(rows: torch.Tensor, ranks: Ranks, teacher: torch.Tensor | None = None, **settings) -> torch.Tensor:
    settings = {"student_temperature": 1.0, "teacher_temperature": 1.0} | settings
    return sharded_relation_kl_loss(rows, rows.detach() ** 2 if teacher is None else teacher, ranks=ranks, **settings)


def derivative(rows: torch.Tensor, order: int, ranks: Ranks, comm: str, sigmoid: bool = False) -> None:
    loss, scalars = (sharded_sigmoid_loss, (10.0, -3.0)) if sigmoid else (sharded_contrastive_loss, (10.0,))
    value = loss(rows, rows.detach() ** 2, *scalars, ranks=ranks, comm=comm)
    for _ in range(order - 1):
        value = torch.autograd.grad(value, rows, create_graph=True)[0].square().sum()
    value.backward()


def half_precision(ranks: Ranks) -> dict[str, torch.Tensor]:
    """bfloat16 embeddings of this rank: their gradients, times 1 / W."""
    x, y = (F.normalize(rows, dim=1).bfloat16().requires_grad_() for rows in own_inputs(ranks)[0])
    sharded_contrastive_loss(x, y, 14.3, ranks=ranks).backward()
    return {"image": x.grad / ranks.size, "text": y.grad / ranks.size}


def second_order(ranks: Ranks, impl: str, dtype: torch.dtype, ids: bool) -> list[torch.Tensor]:
    """Derivatives of the contrastive gradient along a direction, by this rank's rows and the scale; inputs and
    direction are bfloat16 numbers in `dtype`."""
    inputs, pair_id = own_inputs(ranks)
    leaves = [F.normalize(rows, dim=1).bfloat16().to(dtype).requires_grad_() for rows in inputs]
    leaves.append(torch.tensor(14.25, device=ranks.device, dtype=torch.promote_types(dtype, torch.float32)))
    leaves[2].requires_grad_()
    loss = sharded_contrastive_loss(*leaves, pair_id=pair_id if ids else None, ranks=ranks, impl=impl)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    along = sum((g * value.detach().bfloat16().to(g)).sum() for g, value in zip(grads, leaves, strict=True))
    along = along + sum((g * rows.bfloat16().to(g)).sum() for g, rows in zip(grads, inputs, strict=False))
    return [g.double() for g in torch.autograd.grad(along, leaves)]


SECOND = [(dtype, ids) for dtype in (torch.float32, torch.bfloat16) for ids in (False, True)]


def on_rank(ranks: Ranks) -> dict[str, object]:
    found = {
        "meta": [meta_gradient(*pair, ranks) for pair in META],
        "meetings": {
            (way.__name__, rows): meetings(way, rows, ranks) for way in (Gather, Ring, HalfRing) for rows in (1, 3, 4)
        },
        "refusals": refusals(ranks),
        "one row": one_row_each(ranks),
    }
    if ranks.size != 3:
        found |= {"cases": {str(case): gradient(case, ranks) for case in CASES}}
        found |= {"costs": costs(ranks), "matching": costs_of_matching(ranks), "half": half_precision(ranks)}
    if ranks.size == 2 and "triton" in available_impls(ranks.device):
        found |= {"triton": {str(case): gradient(case, ranks) for case in TRITON}}
        found["second"] = [
            [second_order(ranks, "triton", dtype, ids), second_order(ranks, "chunked", torch.float64, ids)]
            for dtype, ids in SECOND
        ]
    return found
