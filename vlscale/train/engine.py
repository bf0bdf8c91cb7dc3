"""DeepSpeed, and nothing else of vlscale, lives here: process groups, ZeRO, optimizer step, engine checkpoints.

It is imported inside the functions that start something, so that `vlscale --help` and evaluation do not pay for it.
"""

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from vlscale.distributed import Ranks
from vlscale.sections import Config, EngineConfig
from vlscale.train.checkpoint_files import Files, handed_over
from vlscale.train.deepspeed_json import json_for_deepspeed, refusals_named
from vlscale.train.elastic import load_full, save_full
from vlscale.train.gradients import Gradients, Held, Move, moving, parameter_norm
from vlscale.train.optimizer import build_optimizer, set_rates
from vlscale.train.rendezvous import groups_within, join

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
            join(backend, rank, size, engine.timeout_seconds)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(dist.destroy_process_group)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(verbose=False)
    return Ranks(rank, size, device, dist.group.WORLD if size > 1 else None)


class Engine:
    """One model under DeepSpeed. Every method is called by all ranks together."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks):
        deepspeed = import_deepspeed()
        self.ranks = ranks
        self._optimizer = build_optimizer(model, config.optim)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        made = json_for_deepspeed(config, ranks.size, learned)
        ranks.barrier()  # notices at once which rank is gone by now
        with refusals_named(config), groups_within(config.engine.timeout_seconds):
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=made)
        self._losses, self._taken = config.train.accumulate_losses, 0  # of an update, and of the one being made
        self._sharded = config.engine.zero_stage > 0 or config.engine.dtype == "bf16"
        self._split = ranks if config.engine.zero_stage == 3 else None  # the ranks that parameters are split over
        self.learned_names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self.learned = [p for p in self.module.parameters() if p.requires_grad]
        self.sizes = [getattr(p, "ds_numel", p.numel()) for p in self.learned]
        self.dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
        self._norms: list[torch.Tensor] = []  # of this rank's gradients of the last backward

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self._engine(**inputs)

    def plain(self, **inputs: torch.Tensor) -> Any:
        """A forward whose backward is `gradients`, beside the engine's own bookkeeping."""
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        """Of one of the losses that the update is the mean of. `change`: given a learned parameter's place in `learned`
        and this rank's gradient of it, the gradient that the engine is to average instead."""
        changed = self.learned if change is not None else []
        hooks = [
            parameter.register_hook(lambda grad, index=index: change(index, grad) / self._losses)
            for index, parameter in enumerate(changed)
        ]
        self._norms = []
        hooks += [parameter.register_hook(self._note_norm) for parameter in self.learned]
        self._engine.set_gradient_accumulation_boundary(self._taken + 1 == self._losses)
        try:
            self._engine.backward(loss, scale_wrt_gas=change is None)
        finally:
            for hook in hooks:
                hook.remove()

    def _note_norm(self, grad: torch.Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))

    def local_norm(self) -> torch.Tensor:
        """() of what this rank handed to the engine in the last backward, before the ranks' average: not finite where
        any element is not. Known at every ZeRO stage without waiting for the device."""
        return torch.stack(self._norms).norm()

    def gradients(self, loss: torch.Tensor) -> Gradients:
        """Of the learned parameters, averaged over ranks; nothing is accumulated, nothing is updated."""
        return Gradients.of(loss, self.learned, self.ranks)

    @contextmanager
    def moving(self) -> Iterator[Move]:
        """Parameters that can be moved along gradients inside the block; see `gradients.moving`."""
        self._drop_gathered()
        with moving(self._held(), self._split) as move:

            def moved(along: Gradients, rate: torch.Tensor, dither: bool = False) -> torch.Tensor:
                self._drop_gathered()
                return move(along, rate, dither)

            try:
                yield moved
            finally:
                self._drop_gathered()

    def parameter_norm(self) -> torch.Tensor:
        return parameter_norm(self._held(), self._split, self.ranks.device)

    def _held(self) -> list[Held]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        def whole(parameter: nn.Parameter) -> Held:
            def master() -> torch.Tensor:
                full = safe_get_full_fp32_param(parameter) if self.dtype == torch.bfloat16 else None
                return parameter.detach().reshape(-1) if full is None else full.reshape(-1)

            return Held(parameter.detach().view(-1), 0, master)

        def shard(parameter: nn.Parameter) -> Held:
            values = parameter.ds_tensor.detach()
            start = min(self.ranks.rank * values.numel(), parameter.ds_numel)
            count = min(values.numel(), parameter.ds_numel - start)  # the last shards end in padding

            def master() -> torch.Tensor:
                full = safe_get_local_fp32_param(parameter) if self.dtype == torch.bfloat16 else values
                return full.reshape(-1)[:count]

            return Held(values[:count], start, master)

        return [whole(p) if self._split is None else shard(p) for p in self.learned]

    def _drop_gathered(self) -> None:
        """ZeRO-3 keeps small parameters gathered, and those of modules whose inputs need no gradient until the engine's
        own backward has ended; drop the copies, so that the next use gathers what the shards say."""
        if self._split is not None:
            self._engine.optimizer.parameter_offload.partition_all_parameters()

    def set_rates(self, lr: float, step: int) -> None:
        """For optimizer step `step`, before its backward."""
        set_rates(self._optimizer, lr, step)

    def step(self) -> float:
        """After each backward. After the last of an update's losses: average the gradients over ranks, clip them by the
        norm of the mean, update. Returns that norm; NaN while losses are still missing."""
        self._taken = (self._taken + 1) % self._losses
        if self._taken:
            return float("nan")
        plain = None if self._sharded else self._norm_of_averaged_gradients()
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if plain is None else plain)

    def drop_gradients(self) -> None:
        """Forget the backwards since the last update; what DeepSpeed does with gradients that overflowed."""
        self._taken = 0
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        if hasattr(optimizer, "_release_preflattened_grad_buffers"):  # stages 1 and 2
            optimizer._release_preflattened_grad_buffers()
            optimizer.all_grad_tensors = {}
            optimizer.micro_step_id = -1
        if hasattr(optimizer, "averaged_gradients"):
            optimizer.averaged_gradients = {}
        if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
            optimizer.reset_cpu_buffers()

    def _norm_of_averaged_gradients(self) -> torch.Tensor:
        """Stage 0 in fp32 has no DeepSpeed optimizer that would know it; gradients are already averaged."""
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def save(self, folder: Path, files: Files) -> None:
        """DeepSpeed's files of a checkpoint that is to be at `folder` go to `files`."""
        with handed_over(self._engine, folder, files):
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.ranks.first:
            files.add("latest", TAG.encode())  # what DeepSpeed's own tools look for

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=TAG)
        self._moments_moved()

    def save_full(self, files: Files) -> None:
        save_full(self, files)

    def load_full(self, folder: Path) -> None:
        load_full(self, folder)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Of the model, by name, without those that models make anew."""
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def moments(self) -> list[str]:
        """What the optimizer keeps for every element, by its own names; empty before its first step."""
        state = next((state for state in self._optimizer.state.values() if state), {})
        return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.ndim)

    def full(self, index: int, key: str | None) -> torch.Tensor:
        """A learned parameter in float32, or one of its moments, whole on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.learned[index]
        if not self._sharded:
            return parameter.detach().float() if key is None else self._optimizer.state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter)
        views = getattr(parameter, "_hp_mapping", None)
        if views is not None and key not in (views.optim_fragment or {}):
            self._moments_moved()  # DeepSpeed links all groups when the first one has stepped: the others have none yet
        self._link_moments()
        return safe_get_full_optimizer_state(parameter, key)

    def set_full(self, index: int, key: str | None, value: torch.Tensor) -> None:
        """What `full` gives, put back at this world size and stage; `start_moments` comes first."""
        from deepspeed import utils

        parameter = self.learned[index]
        value = value.to(self.ranks.device)
        if not self._sharded:
            (parameter.data if key is None else self._optimizer.state[parameter][key]).copy_(value)
        elif self._split is not None:
            shard = parameter.ds_tensor
            padded = nn.functional.pad(value.reshape(-1), (0, shard.numel() * self.ranks.size - value.numel()))
            own = padded[shard.numel() * self.ranks.rank :][: shard.numel()]
            if key is not None:
                utils.safe_set_local_optimizer_state(parameter, own, key)
            else:
                self._drop_gathered()
                utils.safe_set_local_fp32_param(parameter, own)
                shard.data.copy_(own)
        elif key is not None:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def optimizer_steps(self) -> list[float]:
        """The optimizer's own count of its steps, by parameter group; empty where it keeps none."""
        counts: dict[int, float] = {}
        for flat, group in self._flat_parts():
            if "step" in (state := self._optimizer.state.get(flat, {})):
                counts[group] = float(state["step"])
        return [counts[group] for group in sorted(counts)]

    def start_moments(self, moments: list[str], steps: list[float]) -> None:
        """The optimizer as it is after that many steps of its groups, moments zero."""
        for flat, group in self._flat_parts():
            fused = self._optimizer.defaults.get("fused")  # it reads the count where it computes
            device = flat.device if fused else None
            count = {"step": torch.tensor(steps[group], dtype=torch.float32, device=device)}
            self._optimizer.state[flat] = count | {key: torch.zeros_like(flat) for key in moments}
        self._moments_moved()
        self._link_moments()

    def _moments_moved(self) -> None:
        """Stages 1 and 2 keep views of the moments with the parameters, which a load leaves behind."""
        if hasattr(self._engine.optimizer, "_hp_optimizer_states_linked"):
            self._engine.optimizer._hp_optimizer_states_linked = False

    def _link_moments(self) -> None:
        if hasattr(self._engine.optimizer, "_hp_optimizer_states_linked"):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parts(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The tensors that the optimizer itself updates on this rank, each with its parameter group."""
        wrapper = self._engine.optimizer
        if not self._sharded:
            for group, settings in enumerate(self._optimizer.param_groups):
                yield from ((parameter, group) for parameter in settings["params"])
        elif self._split is not None:
            for part, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
                yield flat, wrapper.sub_group_to_group_id[part]
        else:
            flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
            flats = wrapper.fp32_groups_flat_partition if flats is None else flats
            yield from ((flat, group) for group, flat in enumerate(flats))

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
            gathered |= {name: buffer.cpu() for name, buffer in self.buffers().items()}
        return gathered

    def close(self) -> None:
        """Drop DeepSpeed's hooks and states, so that another run can follow in the same processes."""
        self._engine.destroy()
        del self._engine
        gc.collect()


def import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*_into_tensor.*is deprecated", category=FutureWarning)  # its own calls
    # It asks this table, made by running compilers, for one thing: its shared-memory all_reduce for CPUs, which takes
    # half a minute to build at first use and leaves files in /dev/shm when a rank is killed. Gloo does that work here.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
