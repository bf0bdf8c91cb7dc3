"""Step time and efficiency from 1 to 4,096 GPUs, on paper: a model, not measured.

    python benchmarks/scaling_model.py [--assumptions benchmarks/scaling_assumptions.yaml] [--out benchmarks/results]

Operations, parameters, activations and bytes on the wire come from the plan of a run (`vlscale train --plan`); rates
come from one table that a user can edit. Writes DATE-scaling-model.md, .csv and .png.

N pairs on W GPUs, b = N / W each. A step is

    towers     operations / (rate x c s / (c s + half)), s tokens a pair, c pairs at once: b where their activations
               fit, else a chunk, with a third more operations
    loss       8 N^2 D / W operations at the target rate of the kernel
    exchange   by gather bytes of embeddings / bandwidth + latency; by ring what its hops take beyond the tiles that
               they pass under, each hop bytes / bandwidth + latency
    gradients  ZeRO's bytes / bandwidth + latency, less what the backward pass hides

and its efficiency w T(w) / (W T(W)) at the same N, where w is the smallest number of GPUs on which N pairs fit. T(w) is
for equal work: with a second forward where the W have one, and by chunks at least as large as theirs, for which the
memory of w may be too small. `as_run` has T(w) as w GPUs do run it, and passes 1 where they need chunks and W do not.
"""

import argparse
import csv
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import end_with, provenance, today  # noqa: E402
from vlscale.config import PlannedRun, validate  # noqa: E402
from vlscale.train.memory_plan import traffic  # noqa: E402
from vlscale.train.memory_plan_facts import Run, gather_facts  # noqa: E402

MARK = "model, not measured"
ASSUMED = ("device", "losses", "network")  # sections of the table that numbers come from
TRACED = 8  # pairs; towers cost the same for every pair
SMALLEST = 32  # pairs of a chunk, below which a job counts as one that does not fit


@dataclass(frozen=True)
class Step:
    model: str
    batch: int
    gpus: int
    pairs_a_gpu: int
    chunk: int  # pairs that a tower keeps activations of at once
    comm: str
    towers_s: float
    loss_s: float
    exchange_s: float
    gradients_s: float
    seconds: float
    pairs_per_second: float
    efficiency: float  # against the smallest job at equal work
    as_run: float  # against the smallest job as it runs
    basis: str = MARK


def load(path: Path) -> dict:
    """The table of assumptions, every entry of which is a value and where it comes from."""
    assumed = yaml.safe_load(path.read_text())
    for section, name, entry in entries(assumed):
        if not isinstance(entry, dict) or entry.keys() != {"value", "from"} or not isinstance(entry["from"], str):
            raise ValueError(
                f"{path.name}: {section}.{name}: expected {{value: ..., from: words}} and nothing else, got {entry}; "
                "words that hold a comma need quotes"
            )
    return assumed


def entries(assumed: dict) -> list[tuple[str, str, dict]]:
    """(section, name, entry) of all that is assumed."""
    return [(section, name, entry) for section in ASSUMED for name, entry in assumed[section].items()]


def trace(name: str, assumed: dict) -> Run:
    """What one pair costs on one GPU."""
    sweep = assumed["sweep"]
    tree = {
        "model": assumed["models"][name] | {"dropout": 0.0},
        "engine": {"zero_stage": sweep["zero_stage"], "dtype": sweep["dtype"]},
        "train": {"global_batch_size": TRACED},
    }
    config = validate(tree, f"scaling model of {name}")
    return gather_facts(config, [PlannedRun("", config)], 1)


def at_scale(traced: Run, batch: int, gpus: int) -> Run:
    """The same towers in another job."""
    train = traced.config.train.model_copy(update={"global_batch_size": batch})
    return replace(traced, config=traced.config.model_copy(update={"train": train}), world=gpus)


def predict(name: str, traced: Run, batch: int, gpus: int, assumed: dict, like: Step | None = None) -> Step | None:
    """One step; None where it does not fit. `like`: its work is that of this one, whatever the memory."""
    run = at_scale(traced, batch, gpus)
    device, network = assumed["device"], assumed["network"]
    chunk = _chunk(run, device)
    if chunk < min(SMALLEST, run.local):
        return None
    twice = chunk < run.local
    if like is not None:
        chunk, twice = max(chunk, like.chunk), like.chunk < like.pairs_a_gpu
    towers, backward = _towers(run, chunk, twice, device)
    width = run.config.model.embed_dim
    rate = device["product_tflops"]["value"] * 1e12 * assumed["losses"]["contrastive"]["value"][width]
    loss = 8 * batch**2 * width / gpus / rate
    bytes_in = traffic(run)
    exchange = _exchange(run, loss, bytes_in.get("losses", 0), device, network)
    reduced = _transfer(bytes_in.get("gradients", 0), gpus, device, network)
    gathered = _transfer(bytes_in.get("weights", 0), gpus, device, network)
    gradients = max(0.0, reduced - network["hidden_gradients"]["value"] * backward) + gathered
    seconds = towers + loss + exchange + gradients
    return Step(
        model=name,
        batch=batch,
        gpus=gpus,
        pairs_a_gpu=batch // gpus,
        chunk=chunk,
        comm=run.comm if gpus > 1 else "none",
        towers_s=towers,
        loss_s=loss,
        exchange_s=exchange,
        gradients_s=gradients,
        seconds=seconds,
        pairs_per_second=batch / seconds,
        efficiency=1.0,
        as_run=1.0,
    )


def _chunk(run: Run, device: dict) -> int:
    """The largest power of two of pairs whose activations fit beside weights, states and inputs; all if they do."""
    saved = sum(tower.saved for tower in run.towers.values()) / TRACED
    states = (run.parameters + run.learned) * run.size + 12 * run.learned / run.sharded
    free = device["memory_gb"]["value"] * 1e9 * device["memory_use"]["value"] - states - inputs(run)
    if run.local * saved <= free:
        return run.local
    return 2 ** int(math.log2(free / saved)) if free > saved else 0


def inputs(run: Run) -> int:
    """Bytes of a rank's pictures, uint8 until a tower takes them, and captions."""
    return run.local * (3 * run.side**2 + 2 * 8 * run.config.model.text.max_length)


def _towers(run: Run, chunk: int, twice: bool, device: dict) -> tuple[float, float]:
    """Seconds of both towers, forward once or twice, and of their backward passes alone."""
    tokens = chunk * (
        (run.side // run.config.model.vision.config["patch_size"]) ** 2 + run.config.model.text.max_length
    )
    half = device["half_speed_tokens"]["value"]
    rate = device["product_tflops"]["value"] * 1e12 * device["tower_fraction"]["value"] * tokens / (tokens + half)
    forward = run.local / TRACED * sum(tower.forward_flops for tower in run.towers.values()) / rate
    backward = run.local / TRACED * sum(tower.backward_flops for tower in run.towers.values()) / rate
    return forward * (2 if twice else 1) + backward, backward


def _exchange(run: Run, loss: float, count: int, device: dict, network: dict) -> float:
    """Seconds beyond those of the loss itself, which a gather waits for and a ring's tiles pass under.

    By ring `vlscale.objectives.sharded_contrastive` passes on, of b rows, D e and 12 bytes of sums in the forward, a
    quarter of the products, and D e + 8 and 4 D of gradient in the backward; ids are gathered before.
    """
    if run.world == 1:
        return 0.0
    if run.comm == "gather":
        return _transfer(count, run.world, device, network)
    rows, width, e = run.local, run.config.model.embed_dim, run.size
    seconds = _transfer(8 * (run.world - 1) * rows, run.world, device, network)
    for tiles, columns, sums in ((loss / 4, width * e, 12), (3 * loss / 4, width * e + 8, 4 * width)):
        hops = (_hop(rows * each, run.world, device, network) for each in (columns, sums))
        seconds += sweep_seconds(run.comm, run.world, tiles, *hops)
    return seconds - loss


def sweep_seconds(comm: str, ranks: int, tiles: float, columns: float, sums: float) -> float:
    """One sweep in a ring or half a ring, as vlscale/distributed/ring.py and half_ring.py order it.

    tiles: seconds of all its products; columns, sums: of one hop. While a block's tiles are computed the next block's
    columns are under way and the sums of the block before, one after the other; the last sums come home alone. A ring
    visits W blocks; half a ring its own triangle, whose sums stay, and W/2 more, at even W half of the last one.
    """
    if comm == "ring":
        blocks, first = [1.0] * ranks, 0
    else:
        blocks, first = [0.5] + [1.0] * ((ranks - 1) // 2) + [0.5] * (1 - ranks % 2), 1
    last = len(blocks) - 1
    seconds = sums
    for step, block in enumerate(blocks):
        under_way = columns * (step < last) + sums * (step > first)
        seconds += max(tiles * block / sum(blocks), under_way)
    return seconds


def _hop(count: float, gpus: int, device: dict, network: dict) -> float:
    """Seconds of `count` bytes from one rank to the next."""
    inside = gpus <= device["gpus_per_node"]["value"]
    bandwidth = network["inside_node_gbytes" if inside else "between_nodes_gbytes"]["value"] * 1e9
    return network["latency_us"]["value"] * 1e-6 + count / bandwidth


def _transfer(count: float, gpus: int, device: dict, network: dict) -> float:
    """Seconds of a collective in which every rank receives `count` bytes."""
    if gpus == 1 or not count:
        return 0.0
    further = network["latency_us"]["value"] * 1e-6 * (math.ceil(math.log2(gpus)) - 1)
    return further + _hop(count, gpus, device, network)


def sweep(assumed: dict) -> list[Step]:
    steps = []
    for name in assumed["models"]:
        traced = trace(name, assumed)
        for batch in assumed["sweep"]["batches"]:
            jobs = [predict(name, traced, batch, w, assumed) for w in assumed["sweep"]["gpus"] if batch % w == 0]
            fitting = [step for step in jobs if step is not None]
            for step in fitting:
                alike = predict(name, traced, batch, fitting[0].gpus, assumed, like=step)
                shares = [job.gpus * job.seconds / (step.gpus * step.seconds) for job in (alike, fitting[0])]
                steps.append(replace(step, efficiency=shares[0], as_run=shares[1]))
    return steps


def table(steps: list[Step]) -> str:
    head = ["model", "batch", "GPUs", "pairs a GPU", "chunk", "comm", "towers ms", "loss ms", "exchange ms"]
    head += ["gradients ms", "step ms", "pairs/s", "efficiency", "as run"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * 4 + " --- |" + " ---: |" * 8]
    for s in steps:
        parts = (s.towers_s, s.loss_s, s.exchange_s, s.gradients_s, s.seconds)
        cells = [s.model, f"{s.batch:,}", f"{s.gpus:,}", f"{s.pairs_a_gpu:,}", f"{s.chunk:,}", s.comm]
        cells += [f"{1e3 * part:,.1f}" for part in parts] + [f"{s.pairs_per_second:,.0f}"]
        cells += [f"{s.efficiency:.2f}", f"{s.as_run:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_of_assumptions(assumed: dict) -> str:
    lines = ["| assumption | value | from |", "| --- | ---: | --- |"]
    for section, name, entry in entries(assumed):
        value = entry["value"]
        shown = ", ".join(f"{key}: {each:g}" for key, each in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {section}.{name} | {shown} | {entry['from']} |")
    return "\n".join(lines) + "\n"


def plot(steps: list[Step], path: Path) -> None:
    """A column a model: step time above, efficiency below, a line a batch."""
    models = list(dict.fromkeys(step.model for step in steps))
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 6.4), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        own = [step for step in steps if step.model == model]
        for batch in dict.fromkeys(step.batch for step in own):
            line = [step for step in own if step.batch == batch]
            gpus = [step.gpus for step in line]
            axes[0, column].loglog(gpus, [step.seconds for step in line], "o-", ms=3, label=f"{batch:,} pairs")
            axes[1, column].semilogx(gpus, [step.efficiency for step in line], "o-", ms=3)
        axes[0, column].set_title(model)
        axes[1, column].set_xlabel("GPUs")
        axes[1, column].axhline(1, color="0.7", lw=0.8)
        axes[1, column].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("efficiency at equal work")
    axes[0, 0].legend()
    figure.suptitle(f"Scaling: {MARK}; loss rates are targets")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(steps: list[Step], assumptions: Path, folder: Path) -> Path:
    stem = folder / f"{today()}-scaling-model"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=list(asdict(steps[0])))
        rows.writeheader()
        rows.writerows(asdict(step) for step in steps)
    plot(steps, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(
        f"# Scaling: {MARK}\n\n{provenance('python benchmarks/scaling_model.py')} No GPU took part. Towers' operations "
        "and memory are traced, the rest follows from the assumptions below, which nobody has measured here; the loss "
        "runs at target rates. Jobs that do not fit are left out.\n\n"
        "Efficiency is w T(w) / (W T(W)) for the same batch on W GPUs and on w, the fewest that it fits on (the first "
        "row of a batch), at equal work: T(w) has a second forward where the W GPUs have one, and chunks at least as "
        'large as theirs, though the memory of w may not hold them. Under "as run" T(w) is that of the first row, '
        "which passes 1 where w GPUs compute by chunks, and so every forward twice, and W do not.\n\n"
        f"A ring of W ranks makes W - 1 hops of columns and W of sums a sweep, and sweeps twice, forward and "
        "backward. Each hop costs a latency and its bytes, under the tiles of the block at hand.\n\n"
        f"![{MARK}]({stem.name}.png)\n\n{table(steps)}\n## Assumptions ({MARK})\n\n"
        f"`benchmarks/{assumptions.name}`; change it and run the script again.\n\n"
        f"{table_of_assumptions(load(assumptions))}"
    )
    return stem.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assumptions", type=Path, default=ROOT / "benchmarks" / "scaling_assumptions.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    steps = sweep(load(arguments.assumptions))
    print(f"{MARK}: {write(steps, arguments.assumptions, arguments.out)}")


if __name__ == "__main__":
    end_with(main)
