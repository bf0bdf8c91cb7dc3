"""The Triton kernels as compiled for a GPU, at its tile sizes, run by numpy (ptx.py), which sees faults.

Values and gradients in bfloat16 against float64. The whole list for another architecture or way:
`python -m tests.kernels.compiled_cases 80 --at-once`.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.ptx import Arena, Machine, parse

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    "contrastive, fused", "contrastive, waves", "contrastive, waves, waves of one tile", "contrastive, ids",
    "contrastive, maxima", "contrastive, kept", "contrastive, second order", "sigmoid", "sigmoid, ids", "relation_kl",
    "relation_kl, frozen teacher, waves of one tile", "relation_kl, two teachers", "relation_kl, euclidean",
    "relation_kl, matrix", "relation_kl, maxima", "relation_mae", "relation_mae, waves of one tile", "retrieval",
]  # fmt: skip
FEW = ["contrastive, fused", "sigmoid, ids", "relation_kl", "retrieval"]
BOUND = {"loss": 1e-6, "x": 3e-3, "y": 3e-3, "z0": 3e-3, "z1": 3e-3}  # of scalars, which are rounded to bfloat16: 5e-3


@cache
def outcomes(arch: int, *only: str, at_once: bool = False) -> dict[str, dict]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them itself")
    command = [sys.executable, "-m", "tests.kernels.compiled_cases", str(arch), "--only", *only]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *(["--at-once"] if at_once else [])], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}


def check(found: dict) -> None:
    for name, error in found["errors"].items():
        bound = 0 if found["case"] == "retrieval" else BOUND.get(name, 5e-3)
        assert error <= bound, (found["case"], name, error)


@pytest.mark.parametrize("case", CASES)
def test_on_hopper(case):
    check(outcomes(90, *CASES)[case])


@pytest.mark.parametrize("case", FEW)
def test_on_ampere(case):
    check(outcomes(80, *FEW)[case])


def test_every_kernel_has_run():
    run = set().union(*(found["kernels"] for found in outcomes(90, *CASES).values()))
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("triton_*.py"))
    assert run == set(re.findall(r"^ +(\w+_kernel)\[", sources, re.MULTILINE))


def test_nothing_depends_on_when_copies_and_products_happen():
    late, at_once = outcomes(90, *CASES), outcomes(90, "contrastive, waves", "relation_kl", at_once=True)
    for case, found in at_once.items():
        assert found["errors"] == late[case]["errors"]


PTX = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(
	.param .u64 .ptr .global .align 1 small_param_0
)
.reqntid 128
{{
	.reg .b32 	%r<9>;
	mov.u32 	%r1, %tid.x;
	ld.param.b64 	%rd1, [small_param_0];
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 508;
{body}
	ret;
}}
"""
STORE, LOAD = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r4, [%r3];"
OUT = "st.global.b32 [%rd3], %r4;"
COPY = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;\ncp.async.commit_group;"


def small(*body: str, late: bool = True) -> np.ndarray:
    """What 128 threads leave in 128 integers, 7 times their place before."""
    out = 7 * torch.arange(128, dtype=torch.int32)
    arena = Arena([out])
    program = parse(PTX.format(body="\n".join(body)))
    Machine(program, 512, late, seed=0).run((1, 1, 1), arena, [arena.address(out)])
    arena.copy_back()
    return out.numpy()


def test_threads_meet_in_shared_memory_at_a_barrier():
    assert (small(STORE, "bar.sync 	0;", LOAD, OUT) == np.arange(128)[::-1]).all()


def test_without_the_barrier_they_do_not():
    assert (small(STORE, LOAD, OUT) == -1).any()


def test_a_copy_is_there_once_it_is_waited_for():
    waited = COPY, "cp.async.wait_group 	0;", "bar.sync 	0;", LOAD, OUT
    assert (small(*waited) == 7 * np.arange(128)[::-1]).all()
    early = COPY, "bar.sync 	0;", LOAD, "cp.async.wait_group 	0;", OUT
    assert (small(*early) == -1).any() and (small(*early, late=False) == 7 * np.arange(128)[::-1]).all()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (["ld.global.b32 %r4, [%rd3+4];"], "lies outside of what the kernel was given"),
        (["ld.global.b32 %r4, [%rd3+2];"], "is no multiple of 4"),
        (["ld.shared.b32 %r4, [%r2+512];"], "lies outside"),
        (["add.s32 %r4, %r5, 1;"], "KeyError"),
        (["setp.lt.u32 %p1, %r1, 5;", "@%p1 bra $end;", "bar.sync 0;", "$end:"], "part"),
        ([COPY], "in flight"),
        (["sin.approx.f32 %r4, %r1;"], "'sin'"),
    ],
)
def test_a_fault_is_an_error(body, said):
    with pytest.raises((AssertionError, KeyError), match=said):
        small(*body)


def test_threads_that_part_meet_again():
    parts = "setp.lt.u32 %p1, %r1, 5;", "mov.b32 %r4, 1;", "@%p1 bra $less;", "mov.b32 %r4, 2;", "$less:"
    assert (small(*parts, "add.s32 %r4, %r4, %r4;", OUT) == np.where(np.arange(128) < 5, 2, 4)).all()
