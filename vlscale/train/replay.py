"""One step of a run again: from the checkpoint before it, through the steps between, to the same weights and batch."""

from dataclasses import dataclass
from pathlib import Path

from vlscale.distributed import Ranks
from vlscale.evaluate.run import run_config
from vlscale.logging import get_logger
from vlscale.models.hf_folder import quiet
from vlscale.train.bad_numbers import BadNumbers
from vlscale.train.engine import start_ranks
from vlscale.train.key_hash import batch_facts
from vlscale.train.loop import Job, open_run
from vlscale.train.metrics_file import read_metrics
from vlscale.train.setup import check_sizes, corpus_of


@dataclass(frozen=True)
class Replayed:
    step: int
    ranks: Ranks
    values: dict[str, float]  # loss, its parts, gradient norm, as in metrics.jsonl
    keys_hash: str
    keys: list[str]  # of the step's samples, in order
    recorded: dict | None  # the run's own line of that step


def replay(run: Path, step: int) -> Replayed:
    """Steps between the checkpoint and `step` are made again in memory, which keeps weights and random states those of
    the run; nothing in its folder changes but `bad-N.json` of bad steps on the way, which are written as they were."""
    config = run_config(str(run))
    if config is None or not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} is no run: it holds no config.yaml; give the folder of --out, or a stage's or variant's"
        )
    steps = config.train.max_steps or (corpus_of(run) or {}).get("steps", step)
    if not 1 <= step <= steps:
        raise ValueError(f"--step {step}: the run has steps 1 to {steps}")
    check_sizes(config)
    quiet()
    ranks = start_ranks(config.engine)
    with open_run(Job(config, run, ranks, run.name), before=step) as opened:
        if opened.step < step - 1:
            get_logger().info("replaying steps %d to %d, to come to the weights of then", opened.step + 1, step - 1)
        trainer = opened.trainer()
        draws = trainer.draws(opened.batches)
        for number in range(opened.step + 1, step):
            trainer.step(number, next(draws))
        drawn = next(draws)
        try:
            values = trainer.unguarded(step, drawn)
        except BadNumbers as bad:
            values = bad.values
        keys = drawn.keys(ranks)
        recorded = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step]
        return Replayed(step, ranks, values, batch_facts(drawn, ranks)["keys"], keys, recorded[0] if recorded else None)
