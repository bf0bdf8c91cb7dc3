"""Losses by the kernels as compiled for a GPU, run by `ptx.py`: relative errors of their values and gradients, as JSON.

    python -m tests.kernels.compiled_cases 90 [--at-once] [--only NAME ...]

A process of its own, since Triton decides on its import whether it compiles or interprets.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)

import torch

from tests.kernels import cases as k
from tests.kernels.ptx_launch import compiled_for
from tests.kernels.test_gradients import second_order
from vlscale.kernels import (
    contrastive_loss,
    retrieval_ranks,
    topk_neighbors,
    triton_contrastive_double,
    triton_relation_match,
    triton_retrieval,
    triton_sigmoid,
)

PATCHED = triton_contrastive_double, triton_relation_match, triton_retrieval, triton_sigmoid  # with what they import
N = 270  # three tiles of 128 rows, two of 256 columns, the last of each ragged
Outputs = dict[str, torch.Tensor]


def rows(width: int, regime: str = "random", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return k.embeddings(regime, N, width, seed)


def of_case(case: k.Case) -> tuple[Outputs, Outputs]:
    rounded = k.Case({name: value.bfloat16().double() for name, value in case.inputs.items()}, case.loss)
    return case.run("triton", torch.bfloat16), rounded.run("reference")


def contrastive(width: int, *, ids: bool = False, length: float = 1.0, scale: float = 14.3) -> tuple[Outputs, Outputs]:
    x, y = rows(width)
    return of_case(k.contrastive_case(length * x, length * y, scale, torch.arange(N) // 3 if ids else None))


def kept() -> tuple[Outputs, Outputs]:
    found = []
    for impl, keep in (("triton", True), ("reference", False)):
        leaves = [v.bfloat16().to(torch.float64 if impl == "reference" else torch.bfloat16) for v in rows(264)]
        leaves = [v.requires_grad_() for v in leaves]
        loss = contrastive_loss(*leaves, 14.3, impl=impl, keep_products=keep)
        grads = torch.autograd.grad(loss, leaves)
        found.append({"loss": loss.detach().double()} | {name: g.double() for name, g in zip("xy", grads, strict=True)})
    return tuple(found)


def second() -> tuple[Outputs, Outputs]:
    case = k.contrastive_case(*(v.bfloat16().double() for v in rows(72)), 14.0)
    found = second_order(case, "triton", torch.bfloat16), second_order(case, "reference", torch.float64)
    return tuple(dict(zip(("x", "y", "scale"), values, strict=True)) for values in found)


def relations(**settings) -> tuple[Outputs, Outputs]:
    (x, _), (_, z) = rows(72), rows(40)
    return of_case(k.kl_case(x, [z], [1.0], settings.pop("tau", (0.1, 0.1)), **settings))


def frozen_teacher() -> tuple[Outputs, Outputs]:
    """The student's gradient alone, by the largest tiles."""
    (x, _), (_, z) = rows(72), rows(40)
    case = k.kl_case(x, [z], [1.0], (0.1, 0.1))
    rounded = k.Case({name: value.bfloat16().double() for name, value in case.inputs.items()}, case.loss)
    found = (
        k.gradients_of(case, ["x"], "triton", torch.bfloat16)[0],
        k.gradients_of(rounded, ["x"], "reference", torch.float64)[0],
    )
    return tuple({"x": values[0].double()} for values in found)


def two_teachers() -> tuple[Outputs, Outputs]:
    (x, _), (_, z), (_, other) = rows(72), rows(40), rows(24)
    return of_case(k.kl_case(x, [z, other], [0.7, 0.4], (0.2, 0.1)))


def mae() -> tuple[Outputs, Outputs]:
    (x, _), (_, z) = rows(72), rows(40)
    return of_case(k.match_case(x, [z], [1.0], 0.1, "mae"))


def retrieval() -> tuple[Outputs, Outputs]:
    """Small integers: products are exact, so ties are."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (n, 20), generator=generator).bfloat16() for n in (150, 500))
    table = torch.arange(150)[:, None]
    found = []
    for impl in ("triton", "reference"):
        ranks = retrieval_ranks(query, gallery, table, impl=impl)
        near = topk_neighbors(query, gallery, 10, exclude=table, impl=impl)
        names = ("above", "tied", "same", "scores", "indices")
        found.append({name: value.double() for name, value in zip(names, [*ranks, *near], strict=True)})
    return tuple(found)


CASES: dict[str, Callable[[], tuple[Outputs, Outputs]]] = {
    "contrastive, fused": lambda: contrastive(72),
    "contrastive, waves": lambda: contrastive(264),
    "contrastive, ids": lambda: contrastive(72, ids=True),
    "contrastive, maxima": lambda: contrastive(264, length=20.0, scale=1.0),
    "contrastive, kept": kept,
    "contrastive, second order": second,
    "sigmoid": lambda: of_case(k.sigmoid_case(*rows(72), 14.3)),
    "sigmoid, ids": lambda: of_case(k.sigmoid_case(*rows(72), 14.3, torch.arange(N) // 3)),
    "relation_kl": relations,
    "relation_kl, frozen teacher": frozen_teacher,
    "relation_kl, two teachers": two_teachers,
    "relation_kl, euclidean": lambda: relations(relation="euclidean"),
    "relation_kl, matrix": lambda: relations(scope="matrix"),
    "relation_kl, maxima": lambda: relations(tau=(0.004, 0.003)),
    "relation_mae": mae,
    "retrieval": retrieval,
}
WAVES = ", waves of one tile"
for name in (
    "contrastive, waves",
    "sigmoid, ids",
    "relation_kl, frozen teacher",
    "relation_kl, euclidean",
    "relation_mae",
):
    CASES[name + WAVES] = CASES[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, choices=[80, 90])
    parser.add_argument("--at-once", action="store_true", help="copies and products happen where they are started")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    for name in given.only:
        with compiled_for(given.arch, late=not given.at_once, small_waves=name.endswith(WAVES)) as launcher:
            got, truth = CASES[name]()
        errors = {key: k.relative(got[key], exact) for key, exact in truth.items()}
        print(json.dumps({"case": name, "errors": errors, "kernels": launcher.kernels}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
