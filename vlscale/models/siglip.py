"""SigLIP (and SigLIP2 at fixed resolution, which is the same model): towers whose own outputs are the joint space.

There is no projection to learn over them, so the dual encoder holds fixed identities in their place; and `AutoModel`
does not build the text tower, so a pair with it is saved as `SiglipModel`, never as `VisionTextDualEncoderModel`.

Legend: B captions, L tokens, R positions of the text tower (64), D width of the joint space.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, SiglipConfig, SiglipModel, SiglipTextModel, VisionTextDualEncoderModel

MODEL, VISION, TEXT = "siglip", "siglip_vision_model", "siglip_text_model"  # model types


class PaddedSiglipText(SiglipTextModel):
    """SigLIP's text tower with the inputs that it was made for.

    It pools the last of its R positions and was trained on captions padded to R with nothing masked. Shorter rows would
    be pooled elsewhere, and a caption's embedding would change with the longest caption of its batch.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options):
        """Ids and mask (B, L), L <= R; what is masked counts as padding."""
        padding, room = self.config.pad_token_id, self.config.max_position_embeddings
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, padding)
        return super().forward(input_ids=F.pad(input_ids, (0, room - input_ids.shape[1]), value=padding), **options)


def padded(text_model: SiglipTextModel) -> PaddedSiglipText:
    """The same weights, padding by itself."""
    own = PaddedSiglipText(text_model.config)
    own.load_state_dict(text_model.state_dict())
    return own.train(text_model.training)


def pooled_width(tower: PreTrainedModel) -> int | None:
    """Width of a tower's `pooler_output`, as its config says; SigLIP's text tower has a head that may change it."""
    return getattr(tower.config, "projection_size", None) or getattr(tower.config, "hidden_size", None)


def shares_space(vision_model: PreTrainedModel, text_model: PreTrainedModel, embed_dim: int) -> bool:
    """Whether the towers are SigLIP's, both, and `embed_dim` wide.

    Its text tower with anything else is refused: no Hugging Face class could hold the two and their projections.
    """
    vision, text = vision_model.config.model_type, text_model.config.model_type
    if text != TEXT:
        return False
    if vision != VISION:
        raise ValueError(
            f"model.vision: {vision} cannot stand beside {TEXT}, for no Hugging Face class holds both; take SigLIP's "
            "vision tower too, or another text tower"
        )
    widths = [pooled_width(vision_model), pooled_width(text_model)]
    if widths != [embed_dim] * 2:
        raise ValueError(
            f"model.embed_dim={embed_dim}: SigLIP has no projections, its towers give {widths[0]} and {widths[1]} "
            f"numbers; set model.embed_dim={widths[0]}, or take another text tower"
        )
    return True


def fix_identity(projection: nn.Linear) -> None:
    """Make a square projection change nothing and learn nothing."""
    nn.init.eye_(projection.weight)
    projection.requires_grad_(False)


def as_dual_encoder(model: SiglipModel) -> VisionTextDualEncoderModel:
    """A SiglipModel seen as the class that everything else is; its bias stands in the config."""
    text, width = padded(model.text_model), pooled_width(model.text_model)
    dual = VisionTextDualEncoderModel(vision_model=model.vision_model, text_model=text)
    dual.visual_projection, dual.text_projection = (nn.Linear(width, width, bias=False) for _ in range(2))
    for projection in (dual.visual_projection, dual.text_projection):
        fix_identity(projection)
    dual.logit_scale = nn.Parameter(model.logit_scale.detach().squeeze())
    dual.config.projection_dim = width
    dual.config.logit_bias = model.logit_bias.item()
    return dual.eval()


def siglip_model(vision_model: PreTrainedModel, text_model: PreTrainedModel, weights: dict[str, torch.Tensor]):
    """SiglipModel of a dual encoder's towers and state dict; without a bias (softmax loss) its bias is 0."""
    config = SiglipConfig(vision_config=vision_model.config.to_dict(), text_config=text_model.config.to_dict())
    kept = {name: value for name, value in weights.items() if not name.endswith("_projection.weight")}
    kept["logit_scale"] = weights["logit_scale"].reshape(1)
    kept["logit_bias"] = weights.get("logit_bias", torch.zeros(1)).reshape(1)
    with torch.device("meta"):  # only the structure is needed: the weights come from the state dict
        model = SiglipModel(config)
    model.load_state_dict(kept, strict=True, assign=True)
    return model
