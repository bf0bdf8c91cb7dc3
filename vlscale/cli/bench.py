"""`vlscale bench NAME ...`: the measurements behind the project's figures, each a script of benchmarks/."""

import subprocess
import sys

import typer

SCRIPTS = {  # name to script and what it measures
    "kernels": ("kernels_bench.py", "every kernel against dense torch and other libraries"),
    "tune": ("kernels_tune.py", "tile sizes of the Triton kernels for this GPU, by trying them"),
    "step": ("step.py", "what each method's step costs against plain contrastive training"),
    "checkpoint": ("checkpoint_cost.py", "what saving adds to a step, beside training and with training waiting"),
    "matching": ("matching.py", "whether matching learns: held-out accuracy on scenes"),
    "rerank": ("rerank.py", "re-ranking at Flickr30K's size, beside one query a forward"),
    "large-batch": ("large_batch.py", "memory and time of batches larger than memory"),
    "ring": ("ring_overlap.py", "whether a ring's transfers between ranks hide under its tiles"),
    "training": ("training.py", "a real run on GPUs: pairs a second, the loss's share, memory, curves"),
    "data": ("data.py", "pictures a second of the input pipeline, beside other loaders"),
    "stream": ("data_stream.py", "order, memory and resume of the stream on a large corpus"),
    "data-fuzz": ("data_fuzz.py", "damaged shards: what is refused, lost and named"),
    "failures": ("failures.py", "trainings that are killed, starved and damaged, and what is lost: nothing"),
    "method": ("method", "the method study: every method, level and seed, tuned alike"),
    "scaling": ("scaling_model.py", "a model of step time from 1 to 4,096 GPUs"),
}


def bench(
    context: typer.Context,
    name: str = typer.Argument("", help="; ".join(f"{name}: {what}" for name, (_, what) in SCRIPTS.items())),
) -> None:
    """Run a benchmark; what follows its name goes to it (`vlscale bench kernels --help`)."""
    from vlscale.resources import benchmarks_folder

    if not name or name.startswith("-"):
        print(context.get_help())
        return
    if name not in SCRIPTS:
        raise ValueError(f"bench {name}: no such benchmark; choose from: {', '.join(SCRIPTS)}")
    done = subprocess.run([sys.executable, str(benchmarks_folder() / SCRIPTS[name][0]), *context.args])
    sys.exit(done.returncode)
