"""Activation checkpointing: a tower keeps the inputs of its blocks and computes the rest again in the backward pass.

The block's forward runs again under the random state of the first one, so that its dropout is the same. Cost: one more
forward. Memory: of all blocks their inputs, of one block all it saves. Beside it, `chunks` bounds the rows.
"""

from transformers import PreTrainedModel

from vlscale.models.dual_encoder import DualEncoder
from vlscale.models.towers import one_line


def checkpoint_blocks(encoder: DualEncoder, *, random: bool = True) -> None:
    """Both towers, but for locked ones, which keep nothing anyway, and the fusion encoder. `random`: whether dropout
    has to be the same."""
    for modality in ("vision", "text"):
        if modality not in encoder.locked:
            _checkpoint_tower(modality, encoder.tower(modality), random)
    if encoder.fusion is not None:
        _checkpoint_tower("fusion", encoder.fusion.body, random)


def _checkpoint_tower(modality: str, tower: PreTrainedModel, random: bool) -> None:
    enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
    # ZeRO-3 frees weights between the two forwards, so what is saved has another shape in each: no comparing of shapes.
    how = {"use_reentrant": False, "determinism_check": "none", "preserve_rng_state": random}
    try:
        enable(how)
    except ValueError as error:
        raise ValueError(
            f"engine.activation_checkpointing: the {modality} tower ({tower.config.model_type}) has no blocks that can "
            f"be computed again: {one_line(error)}; set engine.activation_checkpointing=false "
            "and, for less memory, train.chunk_size"
        ) from None
