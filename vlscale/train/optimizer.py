"""The optimizer and its parameter groups: no weight decay on norms, biases and scalars; rates by depth; waiting towers.

Layer decay (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254): with L blocks in a tower, depth 0 is what stands before
the first block, block i has depth i + 1, what stands after the last one L + 1; the rate is lr decay^(L + 1 - depth).
Projections and scalars learn at the full rate, and a fusion encoder's layers by depth as a tower's do. Where they were
the text tower's own upper layers, the two are one stack: of F fusion layers over L text layers, what depth the text
tower counts up to L learns at lr decay^(F + L + 1 - depth), as it would in the text model that was split.

A waiting tower (`optim.unlock_after`) is in the optimizer from the start, so that no ZeRO stage has to repartition.
Until its step, its gradients are replaced by zeros before anything sees them (neither the global norm nor the moments
know them), its rate is 0 (so decoupled weight decay multiplies by exactly 1), and the optimizer's own step count is
held at 0, so that bias correction begins when the tower does. Its weights are bit for bit those of the start.
"""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlscale.logging import get_logger
from vlscale.sections import OptimConfig

TOWERS = {"vision": "vision_model", "text": "text_model", "fusion": "fusion"}  # submodules of the dual encoder
NAMES = {"vision": "vision tower", "text": "text tower", "fusion": "fusion encoder"}
FUSED_DEVICES = ("cuda", "cpu")  # on a CPU the fused AdamW takes a fifth of the time of the loop over tensors
Place = tuple[float, int, bool]  # share of the rate, last step of waiting, whether weight decay applies


class _Clock:
    """The optimizer step that is being made. Apart from the groups, which loading a checkpoint replaces."""

    step = 1


_CLOCKS: WeakKeyDictionary[torch.optim.Optimizer, _Clock] = WeakKeyDictionary()


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Its groups carry `lr_scale` and `locked_until`; give them rates by `set_rates` before every backward pass."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not learned:
        raise ValueError("model.locked leaves nothing to learn; unlock a tower")
    scales = rate_scales(model, optim.layer_decay)
    waits = _waits(learned, optim)
    groups: dict[Place, list[nn.Parameter]] = {}
    for name, p in learned.items():
        groups.setdefault((scales[name], waits.get(name, 0), p.ndim >= 2), []).append(p)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][2], *item[0][:2]))
    settings = [
        {"params": p, "weight_decay": optim.weight_decay * decays, "lr_scale": scale, "locked_until": until}
        for (scale, until, decays), p in ordered
    ]
    anywhere = all(p.device.type in FUSED_DEVICES for p in learned.values())
    fused = anywhere if optim.fused == "auto" else optim.fused
    if optim.name == "sgd":
        made = torch.optim.SGD(settings, lr=optim.lr, fused=fused)
    else:
        made = torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    _hold_back(made)
    _tell(model, optim, scales)
    return made


def set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Every group's rate for optimizer step `step` (counted from 1). Call it before the backward pass of that step: it
    also decides which towers still wait. `optimizer` is what `build_optimizer` made, not DeepSpeed's wrapper."""
    if (clock := _CLOCKS.get(optimizer)) is not None:
        clock.step = step
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step <= group["locked_until"] else lr * group["lr_scale"]


def rate_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The share of the learning rate of every parameter, by name."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for prefix in TOWERS.values():
        tower = getattr(model, prefix, None)
        if tower is not None and decay < 1:
            depths = layer_depths(tower)
            top = max(depths.values())
            above = _layers_above(model, prefix)
            rates = {name: decay ** (top - depth + above * (depth < top)) for name, depth in depths.items()}
            scales |= {f"{prefix}.{name}": rate for name, rate in rates.items()}
    return scales


def _layers_above(model: nn.Module, prefix: str) -> int:
    """Of a fusion encoder that was split off this tower, whose pooler is a head all the same."""
    fusion = getattr(model, TOWERS["fusion"], None)
    return len(fusion.layers) if prefix == TOWERS["text"] and fusion is not None and fusion.above_text else 0


def layer_depths(tower: nn.Module) -> dict[str, int]:
    """Depth of every parameter of a tower, by name, for any model whose blocks stand in `nn.ModuleList`s.

    Blocks are numbered in the order of the model. Where lists are nested (Swin's stages of blocks), the innermost
    entries are the blocks, and what else a stage holds belongs to its last block so far.
    """
    lists = {name for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = {name: _block(name, lists) for name, _ in tower.named_parameters()}
    inner = {
        block for block in blocks.values() if block and not any(_is_inside(other, block) for other in blocks.values())
    }
    depths: dict[str, int] = {}
    seen: dict[str, int] = {}
    last_block = max((i for i, block in enumerate(blocks.values()) if block), default=-1)
    for position, (name, block) in enumerate(blocks.items()):
        if block in inner:
            seen.setdefault(block, len(seen) + 1)
        if block:
            depths[name] = seen[block] if block in inner else max(len(seen), 1)
        else:
            depths[name] = len(inner) + 1 if position > last_block else len(seen)
    return depths


def _block(name: str, lists: set[str]) -> str:
    """The innermost entry of a module list that a parameter lies in; empty where it lies in none."""
    parts = name.split(".")
    inside = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in lists]
    return ".".join(parts[: inside[-1] + 1]) if inside else ""


def _is_inside(block: str, outer: str) -> bool:
    return block.startswith(outer + ".")


def _waits(learned: dict[str, nn.Parameter], optim: OptimConfig) -> dict[str, int]:
    """The last step of waiting of every parameter whose tower waits."""
    waits: dict[str, int] = {}
    for tower, until in optim.unlock_after.items():
        names = [name for name in learned if name.startswith(TOWERS[tower] + ".")]
        if not names and tower == "fusion":
            raise ValueError("optim.unlock_after: there is no fusion encoder; leave fusion out, or set model.fusion")
        if not names:
            raise ValueError(
                f"optim.unlock_after: the {NAMES[tower]} is in model.locked and never learns; leave it out of one"
            )
        waits |= dict.fromkeys(names, until)
    return waits


def _hold_back(optimizer: torch.optim.Optimizer) -> None:
    """Zero gradients and a step count of 0 for the groups that wait."""
    waiting = [group for group in optimizer.param_groups if group["locked_until"]]
    if not waiting:
        return
    clock = _CLOCKS[optimizer] = _Clock()
    for group in waiting:
        for p in group["params"]:
            p.register_hook(partial(_zeros_while_locked, clock, group["locked_until"]))
    optimizer.register_step_post_hook(partial(_count_from_unlocking, clock))


def _zeros_while_locked(clock: _Clock, until: int, grad: torch.Tensor) -> torch.Tensor | None:
    return torch.zeros_like(grad) if clock.step <= until else None


def _count_from_unlocking(clock: _Clock, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Parameters are looked up at every step, since ZeRO puts its own flat ones in their place."""
    for group in optimizer.param_groups:
        for p in group["params"] if clock.step <= group["locked_until"] else ():
            if "step" in optimizer.state.get(p, {}):
                optimizer.state[p]["step"].zero_()


def _tell(model: nn.Module, optim: OptimConfig, scales: dict[str, float]) -> None:
    for tower, prefix in TOWERS.items() if optim.layer_decay < 1 else ():
        own = sorted({scale for name, scale in scales.items() if name.startswith(prefix + ".")})
        rates = " ".join(f"{optim.lr * scale:.3g}" for scale in own)
        first = "first layer" if tower == "fusion" else "embeddings"
        if own:
            get_logger().info("%s: learning rate by depth, %s first: %s", NAMES[tower], first, rates)
    for tower, until in optim.unlock_after.items():
        get_logger().info("%s: locked until after step %d", NAMES[tower], until)
