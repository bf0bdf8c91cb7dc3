"""The README's picture, drawn from a measured result.

python benchmarks/plot_demo.py benchmarks/results/DATE-demo.json docs/demo.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {  # as in the README's table: color and marker, which are told apart without the color
    "contrastive only": ("#c98b2b", "o"),
    "relations, jointly": ("#b5475f", "s"),
    "CoVLR, meta step": ("#4a4fb5", "D"),
    "RVLR": ("#2f8f6b", "^"),
}
APART = 0.17  # rows between the runs of one measure, so that none hides another
ROWS = {  # measure: label
    "i2t/r@10": "picture to its captions, R@10",
    "t2i/r@10": "caption to its picture, R@10",
    "i2i/ndcg@10_norm": "picture to similar pictures, NDCG@10",
    "t2t/ndcg@10_norm": "caption to similar captions, NDCG@10",
    "i2it/ndcg@10_norm": "picture to similar of both, NDCG@10",
    "t2it/ndcg@10_norm": "caption to similar of both, NDCG@10",
}


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    results = json.loads(source.read_text())
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for row in range(0, len(ROWS), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", zorder=0)
    for place, (run, (color, marker)) in enumerate(RUNS.items()):
        measures = [results[run]["metrics"][name] for name in ROWS]
        value, low, high = ([m[key] for m in measures] for key in ("value", "low", "high"))
        error = [
            [v - lo for v, lo in zip(value, low, strict=True)],
            [hi - v for v, hi in zip(value, high, strict=True)],
        ]
        rows = [row + APART * (place - (len(RUNS) - 1) / 2) for row in range(len(ROWS))]
        axes.errorbar(value, rows, xerr=error, fmt=marker, color=color, markersize=6, capsize=3, label=run)
    axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_xlabel("percent on held-out scenes, bars are 95 % intervals; NDCG is over chance")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(RUNS))
    figure.savefig(target, dpi=160)


if __name__ == "__main__":
    main()
