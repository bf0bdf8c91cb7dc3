"""An emoji recipe on real pictures and names, with relations and without, from one seed.

    python benchmarks/emoji.py 'SHARDS/emoji-train-*.tar' 'SHARDS/emoji-val-*.tar' [--recipe emoji-cpu] [--write]

Both runs share everything but `objective.name`. `--write` keeps the page, dated, in benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, ROOT, provenance, today

from vlscale.evaluate.result import EvalResult
from vlscale.evaluate.table import markdown

RUNS = {"contrastive only": "contrastive", "contrastive + relations": "covlr"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--recipe", default="emoji-cpu")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    recipe, results, seconds = ROOT / "configs" / f"{arguments.recipe}.yaml", {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, objective in RUNS.items():
            out, started = Path(folder) / objective, time.perf_counter()
            given = [f"data.train={arguments.train}", f"data.val={arguments.val}", f"objective.name={objective}"]
            subprocess.run(
                [sys.executable, "-m", "vlscale", "train", str(recipe), "--out", str(out), *given], check=True
            )
            seconds[name] = time.perf_counter() - started
            measured = json.loads((out / "eval.json").read_text())
            measured.pop("step")
            results[name] = EvalResult.from_json(json.dumps(measured))
    command = f"python benchmarks/emoji.py TRAIN VAL --recipe {arguments.recipe} --write"
    took = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    page = f"# configs/{arguments.recipe}.yaml, {today()}\n\n{provenance(command)}\n\n{took}\n\n{markdown(results)}\n"
    print(page)
    if arguments.write:
        stem = f"{today()}-{arguments.recipe}"
        (RESULTS / f"{stem}.md").write_text(page)
        plain = {name: result.to_dict() for name, result in results.items()}
        (RESULTS / f"{stem}.json").write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
