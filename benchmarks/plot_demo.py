"""The README's picture, drawn from a measured result.

python benchmarks/plot_demo.py benchmarks/results/DATE-demo.json docs/demo.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {"contrastive only": "#c98b2b", "CoVLR, meta step": "#4a4fb5", "RVLR": "#2f8f6b"}
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
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for row, name in enumerate(ROWS):
        ends = [results[run]["metrics"][name]["value"] for run in RUNS]
        axes.plot([min(ends), max(ends)], [row, row], color="#bbbbbb", linewidth=3, zorder=1, solid_capstyle="round")
    for run, color in RUNS.items():
        measures = [results[run]["metrics"][name] for name in ROWS]
        value, low, high = ([m[key] for m in measures] for key in ("value", "low", "high"))
        error = [
            [v - lo for v, lo in zip(value, low, strict=True)],
            [hi - v for v, hi in zip(value, high, strict=True)],
        ]
        axes.errorbar(value, range(len(ROWS)), xerr=error, fmt="o", color=color, markersize=8, capsize=3, label=run)
    axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("percent on held-out scenes, bars are 95 % intervals; NDCG is over chance")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    figure.savefig(target, dpi=160)


if __name__ == "__main__":
    main()
