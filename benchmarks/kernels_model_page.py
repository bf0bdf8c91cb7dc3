"""The pages of benchmarks/kernels_model.py: predictions, and predictions beside measurements."""

from collections.abc import Callable
from statistics import median

import kernels_model_pictures as pictures
from kernels_bench_report import markdown_table
from kernels_model_price import price
from kernels_model_rates import TARGETS, Rates
from kernels_model_trace import trace

SHOWN = (32768, 131072)  # N of the tables, those of the targets
SMALL = 4096
DETAILED = 512  # D of the tables kernel by kernel
NARROW = (128, 256)  # D up to which the contrastive backward is fused
STEP = 1.25  # by which an assumed rate is moved to see what hangs on it
SEEN = 0.01  # of a fraction: less is not listed
MARK = "a model on paper, nothing here was measured"
EARLIER = "2026-11-21-kernels-model.md"

HOW = """Counted are kernels, grids, tiles, waves, torch operations and bytes, by running the launchers on the meta
device with a Hopper GPU's configurations, and instructions in the kernels' SASS
([instruction table](instruction_table.csv)); assumed are the rates below. A tile costs its products on tensor cores,
what feeding them takes longer (second-level cache, shared memory, first loads), and the instructions around them, one
after another where one program fills a multiprocessor; device memory where that is slower. A pass takes as long as the
device or the host, which starts the kernels, whichever is slower: `launches` is the host or the starts. TFLOP/s and
fractions of cuBLAS are on the fewest operations that a pass needs, as the benchmark counts them. Embeddings are
bfloat16 and normalised. `feeding`, `instructions`, `idle kernels` (those that read a flag and return), `memory`,
`sorting` and float32 or float64 `products` name what takes most.
"""

EARLIER_SAYS = f"""An [earlier page]({EARLIER}) compares three ways of making the contrastive gradient by products and
bytes alone. It has fused kernels 1.6 times as fast as waves at D = 128 and 1.2 times at 256, with a warning of the
narrow tiles there; this table also counts feeding and instructions. For stored exponentials (the forward's, kept for
the backward, 2 N^2 bytes) it finds 7 % at D = 512, 15 % at 1024 and nothing up to 256, and says why they were left out;
the tile that they would not recompute is dearer by this page's count."""


def number(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def parts(cost) -> str:
    whole = cost.seconds
    named = [(name, seconds / whole) for name, seconds in cost.parts.most_common() if seconds >= 0.03 * whole]
    return ", ".join(f"{name} {share:.0%}" for name, share in named)


def summary(predictions: list) -> str:
    header = ["family", "pass", "N", "D", "ms", "limit", "TFLOP/s", "of cuBLAS"]
    lines = [
        [p.family, p.which, f"{p.pairs:,}", str(p.width), number(p.ms), p.found.limit]
        + ([number(p.tflops), f"{p.fraction:.2f}"] if p.tflops else ["", ""])
        for p in predictions
    ]
    return f"{MARK}\n\n" + markdown_table(header, lines)


def prediction(predictions: list, rates: Rates, head: str, predict: Callable) -> str:
    text = f"# Kernels on an H200, predicted: {MARK}\n\n{head} No GPU took part.\n\n{HOW}"
    text += "\n## Targets\n\n" + targets(rates, predict)
    text += "\n## Small batches\n\n" + small(rates, predict)
    text += "\n## What hangs on the assumed rates\n\n" + sensitivity(rates, predict)
    for family in dict.fromkeys(p.family for p in predictions):
        mine = {(p.which, p.width, p.pairs): p for p in predictions if p.family == family and p.pairs in SHOWN}
        text += f"\n## {family}\n\n" + of_family(mine)
    text += f"\n## Kernel by kernel, D = {DETAILED}, N = {SHOWN[-1]:,}\n\n" + of_kernels(predictions)
    text += "\n## Pictures to a batch\n\n" + of_pictures(rates)
    text += "\n## Ways that were not taken\n\n" + not_taken(rates, predict)
    text += "\n## Assumed rates\n\n`benchmarks/kernels_model_rates.py`; change them there or by `--set`.\n\n"
    return text + markdown_table(["rate", "value", "from"], [[name, f"{v:g}", src] for name, v, src in rates.table()])


def targets(rates: Rates, predict: Callable) -> str:
    lines = []
    for (family, which, width), (first, then) in TARGETS.items():
        for pairs in SHOWN:
            p = predict(family, which, pairs, width, rates)
            reached = "yes" if p.fraction >= then else "the first" if p.fraction >= first else "no"
            line = [family, which, str(width), f"{pairs:,}", number(p.ms), f"{p.fraction:.2f}"]
            lines.append([*line, f"{first:.2f}, then {then:.2f}", reached, parts(p.found.cost)])
    header = ["family", "pass", "D", "N", "ms", "of cuBLAS", "target", "reached", "device time goes to"]
    return markdown_table(header, lines)


def small(rates: Rates, predict: Callable) -> str:
    """Beside dense torch, which launches less and fits at this size."""
    lines = []
    for family in ("contrastive", "sigmoid", "relation_kl"):
        for which in ("forward", "both"):
            p = predict(family, which, SMALL, DETAILED, rates)
            dense = price(trace(family, SMALL, DETAILED, which, dense=True), rates)
            both = [(p.found.device_s, p.found.host_s), (dense.device_s, dense.host_s)]
            lines.append([family, which, *(number(1e3 * seconds) for pair in both for seconds in pair)])
    header = ["family", "pass", "ours, device", "host", "dense torch, device", "host"]
    return (
        f"N = {SMALL:,}, D = {DETAILED}, milliseconds. The slower of device and host is the pass; the target is to be"
        " never slower than dense torch here.\n\n" + markdown_table(header, lines)
    )


def sensitivity(rates: Rates, predict: Callable) -> str:
    chosen = [("contrastive", "both", DETAILED), ("relation_kl", "both", DETAILED)]

    def fractions(changed: dict[str, float]) -> list[float]:
        given = Rates(rates.changed | changed)
        of = (predict(family, which, SHOWN[-1], width, given) for family, which, width in chosen)
        return [p.tflops / rates.product_tflops for p in of]

    lines = []
    for name, value, source in rates.table():
        if not value or not (source.startswith("assumption") or name == "product_tflops"):
            continue
        moved = list(zip(fractions({name: value / STEP}), fractions({name: value * STEP}), strict=True))
        if max(abs(high - low) for low, high in moved) >= SEEN:
            lines.append([name, *(f"{low:.2f} to {high:.2f}" for low, high in moved)])
    lines.append(
        ["overlap = 1: a tile's parts hide each other", *(f"{found:.2f}" for found in fractions({"overlap": 1}))]
    )
    header = ["rate", *(f"{family}, {which}, D = {width}" for family, which, width in chosen)]
    return (
        f"Predicted fraction of {rates.product_tflops:g} TFLOP/s at N = {SHOWN[-1]:,} with a rate {STEP} times smaller,"
        f" and {STEP} times larger.\n\n" + markdown_table(header, lines)
    )


def of_family(mine: dict) -> str:
    header = ["pass", "D", *(f"ms, N = {n:,}" for n in SHOWN), "limits", "TFLOP/s", "of cuBLAS", "target", "reached"]
    lines = []
    for which, width in dict.fromkeys((which, width) for which, width, _ in mine):
        found = [mine[which, width, n] for n in SHOWN if (which, width, n) in mine]
        last = found[-1]
        limits = " / ".join(dict.fromkeys(p.found.limit for p in found))
        line = [which, str(width), *(number(p.ms) for p in found), limits]
        line += [number(last.tflops), f"{last.fraction:.2f}"] if last.tflops else ["", ""]
        if last.target:
            first, then = last.target
            reached = "yes" if last.fraction >= then else "the first" if last.fraction >= first else "no"
            line += [f"{first:.2f}, then {then:.2f}", reached]
        lines.append(line + [""] * (len(header) - len(line)))
    return f"TFLOP/s, fraction and target at N = {SHOWN[-1]:,}.\n\n" + markdown_table(header, lines)


def of_kernels(predictions: list) -> str:
    header = ["family, pass", "kernel", "starts", "ms", "goes to"]
    lines = []
    for p in predictions:
        if (p.width, p.pairs) != (DETAILED, SHOWN[-1]) or p.which == "both":
            continue
        for name, cost in sorted(p.found.by_kernel.items(), key=lambda item: -item[1].seconds):
            lines.append([f"{p.family}, {p.which}", name, str(cost.count), number(1e3 * cost.seconds), parts(cost)])
        lines.append([f"{p.family}, {p.which}", "the host, beside all these", "", number(1e3 * p.found.host_s), ""])
    return markdown_table(header, lines)


def of_pictures(rates: Rates) -> str:
    found = pictures.predict(rates)
    return (
        f"`vlscale bench kernels --pictures`, {found['pictures']} pictures of {pictures.HEIGHT} x {pictures.WIDTH} to"
        f" {pictures.SIDE}, bfloat16, the kernel alone: {number(found['ms'])} ms, {found['share']:.2f} of a copy's"
        f" rate; its bytes alone would take {number(found['bytes_ms'])} ms, instructions the rest. The call also sends"
        " five small descriptions to the device.\n"
    )


def not_taken(rates: Rates, predict: Callable) -> str:
    lines = []
    for width in NARROW:
        for pairs in SHOWN:
            fused = predict("contrastive", "backward", pairs, width, rates)
            waves = price(trace("contrastive", pairs, width, "backward", waves=True), rates)
            lines.append([str(width), f"{pairs:,}", number(fused.ms), number(1e3 * waves.seconds)])
    header = ["D", "N", "fused, ms", "waves, ms"]
    text = "The contrastive backward of narrow embeddings is fused; by waves it would be\n\n"
    return text + markdown_table(header, lines) + f"\n{EARLIER_SAYS}\n"


def comparison(rows: list[dict], devices: str, square: float | None, rates: Rates, command: str) -> str:
    ratios = sorted(float(row["ratio"]) for row in rows)
    text = f"# Kernels: predicted and measured\n\n`{command}`; measured on {devices}, predicted for an H200.\n\n"
    if square:
        text += f"The plain product ran at {square:.0f} TFLOP/s, the model assumes {rates.product_tflops:g}. "
    text += f"Measured / predicted: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {median(ratios):.2f}.\n\n"
    header = ["family", "pass", "N", "D", "scale", "dtype", "predicted ms", "measured ms", "ratio", "predicted limit"]
    names = ("family", "pass", "pairs", "width", "scale", "dtype", "predicted_ms", "measured_ms", "ratio")
    return text + markdown_table(header, [[row[name] for name in (*names, "predicted_limit")] for row in rows])
