"""DeepSpeed, and nothing else of vlscale, lives here: process groups, ZeRO, optimizer step, engine checkpoints.

DeepSpeed's JSON is derived from the config (`deepspeed_config`), never written by hand. It is imported inside the
functions that start something, so that `vlscale --help` and evaluation do not pay for it.
"""

import atexit
import gc
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from vlscale.distributed import Ranks
from vlscale.sections import Config, EngineConfig
from vlscale.train.optimizer import build_optimizer

TAG = "engine"  # folder of DeepSpeed's files inside one of our checkpoints


def start_ranks(engine: EngineConfig) -> Ranks:
    """Join the process group that the launcher (deepspeed's or torchrun) describes in the environment; without one, be
    rank 0 of 1.

    It lasts until the process ends, since DeepSpeed keeps references to it; a second call joins the same one.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    torch.set_num_threads(engine.threads or max(1, (os.cpu_count() or 1) // local_size))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = ("nccl" if cuda else "gloo"), timedelta(seconds=engine.timeout_seconds)
        if size > 1:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(dist.destroy_process_group)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(verbose=False)
    return Ranks(rank, size, device, dist.group.WORLD if size > 1 else None)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for this run."""
    derived = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.engine.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    extra = dict(config.engine.deepspeed)
    if taken := sorted(derived.keys() & extra.keys()):
        raise ValueError(f"engine.deepspeed.{taken[0]} is derived from other keys of the config; set those instead")
    zero = {"stage": config.engine.zero_stage} | extra.pop("zero_optimization", {})
    if zero["stage"] != config.engine.zero_stage:
        raise ValueError("engine.deepspeed.zero_optimization.stage contradicts engine.zero_stage; set only the latter")
    return derived | {"zero_optimization": zero} | extra


class Engine:
    """One model under DeepSpeed. Every method is called by all ranks together."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks):
        deepspeed = _import_deepspeed()
        self.ranks = ranks
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config=deepspeed_config(config, ranks.size),
        )
        self._sharded = config.engine.zero_stage > 0 or config.engine.dtype == "bf16"

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """Average the gradients over ranks, clip them, update. Returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        plain = None if self._sharded else self._norm_of_averaged_gradients()
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if plain is None else plain)

    def _norm_of_averaged_gradients(self) -> torch.Tensor:
        """Stage 0 in fp32 has no DeepSpeed optimizer that would know it; gradients are already averaged."""
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=TAG)

    def weights(self) -> dict[str, torch.Tensor]:
        """The full float32 state dict on the CPU of rank 0, from the master weights; empty on the other ranks."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        gathered: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is None:  # frozen, or no master copy at this stage and dtype
                with GatheredParameters([parameter]):
                    full = parameter.detach().clone()
            if self.ranks.first:
                gathered[name] = full.float().cpu()
        if self.ranks.first:
            kept = self.module.state_dict().keys()  # buffers that models make anew are not among them
            gathered |= {name: buffer.cpu() for name, buffer in self.module.named_buffers() if name in kept}
        return gathered

    def close(self) -> None:
        """Drop DeepSpeed's hooks and states, so that another run can follow in the same processes."""
        self._engine.destroy()
        del self._engine
        gc.collect()


def _import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*_into_tensor.*is deprecated", category=FutureWarning)  # its own calls
    # It asks this table, made by running compilers, for one thing: its shared-memory all_reduce for CPUs, which takes
    # half a minute to build at first use and leaves files in /dev/shm when a rank is killed. Gloo does that work here.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
