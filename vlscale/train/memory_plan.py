"""What a run will cost a rank, before it starts: memory, bytes on the wire, operations; for any number of ranks.

One model serves the command, the tests (which hold it to measured peaks) and benchmarks/scaling_model.py. Towers are
traced (`memory_plan_trace`), what is known of a run is `memory_plan_facts`; the rest is counted here.

Legend: W ranks, b pairs a rank, N = W b, D embedding width, e bytes of a number (2 in bf16), P parameters, T of them
learned. Bytes and operations are a rank's, traffic is what it receives, all of one step.

Peaks are the largest of three moments: `teachers`, `backward` and `update`. Weights, master weights and optimizer
states are there in all of them.
"""

import os
from dataclasses import dataclass, field

import torch

from vlscale.config import PlannedRun
from vlscale.data.lanes import choose_lanes
from vlscale.data.stream import open_train_corpus
from vlscale.distributed import rank_memory
from vlscale.sections import Config
from vlscale.train.epochs import in_words, with_steps
from vlscale.train.memory_plan_facts import MASTER, Run, gather_facts
from vlscale.train.memory_plan_losses import loss_bytes, loss_operations, loss_traffic

BUCKET = 500_000_000  # numbers: DeepSpeed's default reduce_bucket_size
LIVE = 1_000_000_000  # numbers: DeepSpeed's default stage3_max_live_parameters
PREFETCH = 50_000_000  # numbers: DeepSpeed's default stage3_prefetch_bucket_size
PLACE = 8  # bytes of a place in the global batch


@dataclass(frozen=True)
class RunPlan:
    name: str
    world_size: int
    local_batch_size: int
    zero_stage: int
    dtype: str
    parameters: int
    learned: int
    memory: dict[str, int]  # bytes by what holds them
    host_memory: dict[str, int]  # the same, of what DeepSpeed offloads
    moments: dict[str, int]  # bytes at each moment; the largest is the peak
    traffic: dict[str, int]  # bytes
    operations: dict[str, int]
    length: str = ""  # in steps, where they are known
    comm: str = ""  # how losses meet rows of other ranks, where there are any
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.moments.values())


def plan_runs(plan: list[PlannedRun], world_size: int) -> list[RunPlan]:
    """The cost of every run of a plan."""
    return [plan_run(run, plan, world_size) for run in plan]


def plan_run(run: PlannedRun, plan: list[PlannedRun], world_size: int) -> RunPlan:
    config = run.config
    choose_lanes(config.train.global_batch_size, world_size, config.data.lanes)  # says what does not divide
    length, *notes = _length(config)
    facts = gather_facts(config, plan, world_size, _memory_here(world_size))
    memory, host = _persistent(facts)
    passing = _passing(facts)
    text = config.model.text
    if text.config is not None and text.tokenizer is None:
        notes.append(f"the tokenizer is trained when the run starts: counted with all {text.vocab_size} words")
    if (memory | passing).get("buckets", 0) > 2 * facts.learned * facts.size:
        zero = "engine.deepspeed={zero_optimization: {reduce_bucket_size: NUMBERS}}"
        notes.append(f"buckets are larger than all gradients: {zero} makes them smaller")
    if facts.losses > 1:
        notes.append(f"a step is {facts.losses} losses, each over {config.train.global_batch_size} pairs of its own")
    if config.teacher.source == "cache":
        notes.append("the cached teachers are counted as wide as the student")
    if config.meta.mode == "heads":
        notes.append("meta.mode=heads: what differentiating the contrast twice adds to the losses is not counted")
    if config.data.decode == "device":
        notes.append("data.decode=device: the decoded pictures, of any sizes, are not counted")
    return RunPlan(
        name=run.name,
        world_size=world_size,
        local_batch_size=facts.local,
        zero_stage=facts.stage,
        dtype=config.engine.dtype,
        parameters=facts.parameters,
        learned=facts.learned,
        memory=memory | passing,
        host_memory=host,
        moments=_moments(facts, sum(memory.values()), passing),
        traffic=traffic(facts),
        operations=operations(facts),
        length=length,
        comm=str(facts.met) if world_size > 1 else "",
        notes=notes,
    )


def _memory_here(world_size: int) -> int:
    """What a rank of this machine has: the ranks of a plan are taken to have as much."""
    if torch.cuda.is_available():
        return rank_memory(torch.device("cuda", 0))
    return rank_memory(torch.device("cpu"), int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def _length(config: Config) -> list[str]:
    """How many steps, and a note where that is not known."""
    train = config.train
    if train.max_steps is not None:
        return [f"{train.max_steps:,}"]
    if train.epochs is None:
        return ["", "neither train.max_steps nor train.epochs is set, and a run needs one of them"]
    try:
        samples = open_train_corpus(config.data).num_samples
    except ValueError as error:
        return ["", f"how many steps train.epochs={train.epochs:g} are is not known here: {error}"]
    train = with_steps(config, samples).train
    return [f"{train.max_steps:,}", in_words(train, samples)]


def _persistent(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """What is there all the time, on the device and on the host."""
    stage = run.stage
    device = {
        "weights": run.parameters * run.size // (run.world if stage == 3 else 1),
        "master weights": run.learned * MASTER // run.sharded * (stage > 0),
        "optimizer states": 2 * run.learned * MASTER // run.sharded * (run.config.optim.name == "adamw"),
        "teacher weights": sum(tower.parameters for tower in run.teachers.values()) * run.size,
    }
    if stage == 3:  # made once, at the start
        device |= {"gradients": run.learned * run.gradient_size // run.world, "buckets": _bucket_bytes(run)}
        live = min(run.parameters, int(run.zero.get("stage3_max_live_parameters", LIVE)))
        ahead = min(run.parameters, int(run.zero.get("stage3_prefetch_bucket_size", PREFETCH)))  # in one piece first
        device["gathered weights, at most"] = (live + ahead) * run.size * (run.world > 1)
    host = {}
    of_optimizer = ("master weights", "optimizer states", *(("gradients",) if stage == 3 else ()))
    for key, parts in (("offload_optimizer", of_optimizer), ("offload_param", ("weights",))):
        if run.offloads(key):
            host |= {part: device.pop(part) for part in parts}
    if run.config.train.checkpoint_async:
        host["checkpoint on its way"] = _checkpoint_bytes(run)
    return device, host


def _checkpoint_bytes(run: Run) -> int:
    """Of the copy that rank 0 writes while training goes on, the largest of all: weights as they are, at stage 3 a
    share of those that do not learn, master weights and moments, and with `train.elastic` these again by parameter."""
    states = MASTER * (1 + 2 * (run.config.optim.name == "adamw")) * run.learned
    weights = (run.parameters if run.stage < 3 else (run.parameters - run.learned) // run.world) * run.size
    own = states // run.sharded if run.stage else states - MASTER * run.learned  # stage 0 has no master weights
    return weights + own + (states // run.world) * run.config.train.elastic


def _passing(run: Run) -> dict[str, int]:
    """What is there for a part of the step."""
    stage = run.stage
    passing = {"inputs": _input_bytes(run), "activations": _activation_bytes(run), "loss": loss_bytes(run)}
    if stage < 3:
        passing["gradients"] = run.learned * run.gradient_size // (run.world if stage == 2 else 1)
    if stage in (1, 2):
        passing["buckets"] = _bucket_bytes(run)
    if run.passes.kept:
        before = run.learned // (run.world if stage == 3 else 1)
        passing["meta step"] = (run.passes.kept * run.learned + before) * run.size
    return passing


def _moments(run: Run, always: int, passing: dict[str, int]) -> dict[str, int]:
    """Bytes at the three moments. ZeRO 1 to 3 move gradients to their buckets as they come, stage 0 leaves them where
    they are, while activations become fewer; by chunks they come when the last one has added to them, so that those of
    a whole tower wait. Those of an update's earlier losses are there all the while."""
    stage, once = run.stage, run.once
    update = always + passing["inputs"]
    always = update + passing.get("meta step", 0)
    gradients, activations = passing.get("gradients", 0), passing["activations"]
    if not run.chunked:
        waiting = (run.passes.at_once - 1) * once.saved
        backward = max(activations, waiting + once.saved + passing["loss"])
        with_gradients = waiting + once.peak_with_gradients
    else:
        backward = activations + passing["loss"]
        with_gradients = activations + gradients
    if stage == 0:
        backward = max(backward, with_gradients)
    elif run.chunked:
        backward += run.size * (run.learned if run.fuses else max(tower.learned for tower in run.towers.values()))
    if 0 < stage < 3:
        backward += passing["buckets"] + (gradients if stage == 2 and run.world > 1 else 0)
    if run.losses > 1:
        backward = max(backward, sum(passing.values()) - passing["inputs"] - passing.get("meta step", 0))
    flat = run.learned * MASTER // run.sharded  # gradients in one piece, for the optimizer or the reduction
    largest = max(part.largest for part in run.parts)
    scratch = 2 * MASTER * (run.learned // run.sharded if stage else largest)
    if run.offloads("offload_optimizer"):
        flat = scratch = 0
    elif run.config.optim.fused is not False:
        scratch = 0
    return {
        "teachers": always + max((tower.peak for tower in run.teachers.values()), default=0),
        "backward": always + backward,
        "update": update + gradients + flat + scratch * (run.config.optim.name == "adamw"),
    }


def _bucket_bytes(run: Run) -> int:
    """Two where stages 1 and 2 are asked to overlap, which they do not by themselves."""
    twice = run.stage < 3 and bool(run.zero.get("overlap_comm"))
    return int(run.zero.get("reduce_bucket_size", BUCKET)) * run.size * (1 + twice)


def _input_bytes(run: Run) -> int:
    """All views of a rank's pictures, uint8 until a tower takes them or floats that the device makes, captions, and
    the teachers' embeddings."""
    pixel = run.size if run.config.data.decode == "device" else 1
    teachers = run.local * sum(run.teacher_width(name) for name in run.rows) * (run.config.teacher.source != "none")
    return (
        run.rows["vision"] * 3 * run.side**2 * pixel
        + 2 * 8 * run.rows["text"] * run.config.model.text.max_length
        + teachers * run.size
    )


def _activation_bytes(run: Run) -> int:
    """Unchunked, the vision tower's wait while the text tower goes forward and back; by chunks, one tower's at a time,
    beside the embeddings of all rows, their copies in one piece and their gradients. With a fusion encoder both towers'
    wait for it, and by chunks the negatives of all pairs too."""
    heads = run.teacher_heads.saved if run.teacher_heads else 0
    if not run.chunked:
        return (run.passes.at_once - 1) * run.once.saved + run.once.peak + heads
    embeddings = sum(run.rows.values()) * run.config.model.embed_dim * run.size
    negatives = run.local * run.fused.there if run.fuses else 0
    return 3 * run.passes.at_once * embeddings + negatives + run.once.peak + heads


def traffic(run: Run) -> dict[str, int]:
    """Bytes that a rank receives in one update, by what they are for; stages 2 and 3 reduce after every loss.

    Gradients and weights: (W-1)/W of them for each time that they travel; a meta step's own gradients go to all, in
    float32. Hard negatives: (W-1)/W N (2 D e + 32) to choose them, with ids, places and what is asked for; then their
    tokens and the gradients of these, or by chunks their inputs, of the (W-1)/W b that other ranks hold when all are as
    likely.
    """
    if run.world == 1:
        return {}
    stage, everyone, width = run.stage, run.config.train.global_batch_size, run.config.model.embed_dim
    others = (run.world - 1) / run.world
    chosen = travelled = 0.0
    if run.fuses and run.config.objective.matching_weight > 0:
        chosen = others * everyone * (2 * width * run.size + 4 * PLACE)
        travelled = others * run.local * (run.fused.there + run.fused.back)
    gradients = others * run.learned * run.size * {0: 2, 1: 1, 2: run.losses, 3: run.losses}[stage]
    gradients += others * run.learned * MASTER * 2 * run.passes.kept * run.losses
    again = 3.0 if run.chunked or run.config.engine.activation_checkpointing else 2.0
    passes = again * max(run.forwards.values()) * run.passes.towers * run.losses
    weights = {0: 0.0, 1: 1.0, 2: 1.0, 3: passes}[stage]
    return {
        "losses": loss_traffic(run) * run.losses,
        **({"negatives": int(chosen + travelled * run.passes.towers) * run.losses} if chosen else {}),
        "gradients": int(gradients),
        "weights, at most" if stage == 3 else "weights": int(others * run.parameters * run.size * weights),
    }


def operations(run: Run) -> dict[str, int]:
    """Multiplications and additions of a rank in one update: products only, as FLOP counters count."""
    locked = run.config.model.locked  # a tower that keeps nothing for its backward runs once, by chunks too
    seen = [(run.towers[name], count, count > 1 and name not in locked) for name, count in run.forwards.items()]
    choosing = 0
    if run.fuses:
        count = run.local // run.at_once
        if count > 1 and run.config.objective.matching_weight > 0:
            choosing = sum(tower.forward_flops for tower in run.towers.values()) * count * run.losses
        seen = [(run.fused, count, count > 1)]
    towers = sum(count * ((1 + twice) * cost.forward_flops + cost.backward_flops) for cost, count, twice in seen)
    asked = dict(zip(("vision", "text"), run.config.objective.teachers_seen, strict=True))
    teachers = sum(cost.forward_flops for name, cost in run.teachers.items() if asked[name])
    teachers *= run.local // run.at_once
    if run.teacher_heads is not None:
        teachers += run.teacher_heads.forward_flops + run.teacher_heads.backward_flops
    return {
        "towers": towers * run.passes.towers * run.losses + choosing,
        "teachers": teachers * run.losses,
        "losses": loss_operations(run) * run.losses,
    }
