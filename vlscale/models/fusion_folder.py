"""A fusion encoder on disk: `fusion/` beside the dual encoder's own files, which plain `transformers` loads without it.

fusion/config.json        the Hugging Face config that rebuilds it, with `text_width` and `vision_width`
fusion/model.safetensors  its weights in float32, under the names that they have in `FusionEncoder`
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from vlscale.models.fusion import FusionEncoder
from vlscale.models.towers import one_line

FOLDER = "fusion"  # in a Hugging Face folder


def save_fusion(fusion: FusionEncoder, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Into `folder`/fusion; `weights` where they are not the module's own (sharded, or in bf16)."""
    inside = folder / FOLDER
    inside.mkdir(parents=True, exist_ok=True)
    own = fusion.state_dict() if weights is None else weights
    fusion.config.save_pretrained(inside)
    kept = {name: value.float().contiguous() for name, value in own.items()}
    save_file(kept, inside / "model.safetensors", {"format": "pt"})


def load_fusion(
    folder: str | Path, towers: tuple[PreTrainedModel, PreTrainedModel] | None = None
) -> FusionEncoder | None:
    """The FusionEncoder of a Hugging Face folder in evaluation mode, None where it has none; with `towers` (vision,
    text), one of other widths is refused."""
    inside = Path(folder) / FOLDER
    if not inside.is_dir():
        return None
    try:
        config = AutoConfig.from_pretrained(inside)
        weights = load_file(inside / "model.safetensors")
        widths = {"vision": config.vision_width, "text": config.text_width}
        fusion = FusionEncoder(config)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{inside} holds no fusion encoder that can be loaded: {one_line(error)}") from None
    for tower, (modality, width) in zip(towers or (), widths.items(), strict=False):
        if tower.config.hidden_size != width:
            raise ValueError(
                f"{inside} is of another dual encoder: it takes {modality} tokens of {width} numbers, the {modality} "
                f"tower beside it gives {tower.config.hidden_size}; put back the folder that it was saved with"
            )
    own = fusion.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        got, expected = (tuple(each[name].shape) if name in each else None for each in (weights, own))
        if got != expected:
            raise ValueError(
                f"{inside}: weight {name} has shape {got}, expected {expected} by its config.json; the two files "
                "belong to different models"
            )
    fusion.load_state_dict(weights)
    return fusion.eval()
