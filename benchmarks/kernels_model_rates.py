"""What benchmarks/kernels_model.py assumes of an H200. Nothing here was measured by it.

Change a value here, or by --set NAME=VALUE, and run the script again. Sources: the card's data sheet; NVIDIA's
programming guide (throughput of instructions, compute capability 9.0); the design of the kernels; the rest are
assumptions.
"""

RATES: dict[str, tuple[float, str]] = {  # name: (value, what it is and where it comes from)
    "multiprocessors": (132, "data sheet"),
    "clock_ghz": (1.7, "assumption; the data sheet's boost is 1.98, products at full power bring it down"),
    "product_tflops": (790, "cuBLAS bf16 on large squares, about, as published for this card; the yardstick"),
    "tile_product": (0.85, "assumption; of that, a Triton loop over features that lacks nothing"),
    "float32_tflops": (50, "assumption; cuBLAS without TF32, three quarters of the data sheet's 67"),
    "float64_tflops": (55, "assumption; cuBLAS, four fifths of the data sheet's 67"),
    "memory_tbytes": (4.2, "assumption; bytes a second, of the data sheet's 4.8"),
    "cache_tbytes": (7.2, "assumption; second-level cache to multiprocessors, four fifths of 5,120 bytes a clock"),
    "shared_bytes": (128, "programming guide; of shared memory, a clock and multiprocessor"),
    "issue": (4, "programming guide; instructions of warps, a clock and multiprocessor"),
    "issue_share": (0.75, "assumption; of those, with two warps a scheduler"),
    "fp32_clocks": (0.25, "programming guide; a multiprocessor's clocks for a warp's float32 instruction, 128 lanes"),
    "integer_clocks": (0.5, "programming guide; for integers, comparisons, selections, conversions, 64 lanes"),
    "memory_clocks": (1.0, "programming guide; for loads, stores and shuffles, 32 lanes"),
    "special_clocks": (2.0, "programming guide; for exponentials, reciprocals and roots, 16 lanes"),
    "first_load_us": (0.4, "assumption; until a loop over features has its first operands, from the cache"),
    "overlap": (0.0, "assumption; of a tile's shorter part, what one program hides under its longer one"),
    "few_tiles": (0.8, "assumption; of cuBLAS's rate where a product has fewer tiles than multiprocessors"),
    "sort_gkeys": (2.0, "assumption; torch.sort of float32 rows, keys a nanosecond"),
    "launch_us": (2.5, "assumption; the least that a kernel adds to a stream"),
    "idle_program_us": (0.4, "assumption; a program that reads a flag and returns, until the next one has its place"),
    "host_us": (4.5, "assumption; a torch operation, from Python to its launch"),
    "host_view_us": (1.5, "assumption; one that launches nothing"),
    "host_triton_us": (15, "assumption; the launch of a Triton kernel with some thirty arguments"),
    "host_op_us": (60, "assumption; a library operation of our own, with autograd"),
}

# Fractions of cuBLAS on the minimal operations that the kernels were designed for, at N of 32,768 to 131,072: the first
# and the second target, by family, pass and width.
TARGETS: dict[tuple[str, str, int], tuple[float, float]] = {
    ("contrastive", "forward", 512): (0.60, 0.75),
    ("contrastive", "forward", 1024): (0.70, 0.80),
    ("contrastive", "both", 512): (0.60, 0.70),
    ("contrastive", "both", 1024): (0.70, 0.80),
    ("relation_kl", "both", 512): (0.50, 0.60),
    ("relation_kl", "both", 1024): (0.60, 0.70),
}


class Rates:
    """The values as attributes, some of them changed."""

    def __init__(self, changed: dict[str, float] | None = None):
        for name in changed or {}:
            if name not in RATES:
                raise ValueError(f"--set {name}: no such rate, expected one of {', '.join(RATES)}")
        self.changed = changed or {}
        vars(self).update({name: value for name, (value, _) in RATES.items()} | self.changed)

    def table(self) -> list[tuple[str, float, str]]:
        return [
            (name, getattr(self, name), "--set" if name in self.changed else source)
            for name, (_, source) in RATES.items()
        ]
