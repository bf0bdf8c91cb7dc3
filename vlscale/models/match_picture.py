"""Many captions matched with one picture: what re-ranking asks, at a fraction of a forward over repeated pictures.

`FusionEncoder.forward` takes a picture a caption. Here all captions share one, and four things are not computed again:
- keys and values of the picture's tokens: once, not once a caption. A query token of cross-attention sees the picture's
  tokens alone, no other query, so the captions' tokens stand side by side as the queries of one row;
- copies of the picture's tokens;
- the first layer's self-attention, which sees no picture yet: once a caption (`read_captions`), not once a pair;
- what follows the last layer's self-attention for any token but [CLS], which is all that matching reads.

Operations a pair, in W^2 multiply-adds, W of every width, feed-forward 4 W, L text tokens, V vision tokens, N layers:
    forward        N (14 L + 2 V)           self-attention 4 L, queries and outputs of cross-attention 2 L, feed-forward
                                            8 L, keys and values of the picture 2 V
    here           (N - 1) 14 L + 10        the first layer without 4 L, the last with 4 L and 10
At L = 16, V = 197 and six layers: 3,708 against 1,130, 3.3 times fewer.
"""

import torch
from transformers.masking_utils import create_bidirectional_mask

from vlscale.models.fusion import FusionEncoder


def match_picture(
    fusion: FusionEncoder, text_tokens: torch.Tensor, text_mask: torch.Tensor, picture: torch.Tensor
) -> torch.Tensor:
    """Matching logits (P, 2) of P captions (P, L, Wt) with mask (P, L) and one picture's tokens (V, Wv).

    Equal to `fusion.matching(fusion(text_tokens, text_mask, picture repeated)[:, 0])` but for rounding.
    """
    return match_read(fusion, read_captions(fusion, text_tokens, text_mask), text_mask, picture)


def read_captions(fusion: FusionEncoder, text_tokens: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """(P, L, Wt) to what the first layer sees before it looks at a picture, (P, L, W)."""
    text = fusion.text_projection(text_tokens)
    return fusion.layers[0].attention(text, _mask(fusion, text, text_mask))[0]


def match_read(
    fusion: FusionEncoder, text: torch.Tensor, text_mask: torch.Tensor, picture: torch.Tensor
) -> torch.Tensor:
    """As `match_picture`, of captions (P, L, W) that are read already."""
    vision = fusion.vision_projection(picture[None])
    mask = _mask(fusion, text, text_mask)
    for layer in fusion.layers:
        if layer is not fusion.layers[0]:
            text, _ = layer.attention(text, mask)
        if layer is fusion.layers[-1]:
            text = text[:, :1]
        looked, _ = layer.crossattention(text.reshape(1, -1, fusion.width), encoder_hidden_states=vision)
        text = layer.feed_forward_chunk(looked.view(text.shape))
    return fusion.matching(text[:, 0])


def _mask(fusion: FusionEncoder, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    return create_bidirectional_mask(
        config=fusion.config, inputs_embeds=text, attention_mask=text_mask, allow_is_bidirectional_skip=False
    )
