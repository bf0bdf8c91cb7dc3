"""What guesses masked words from fused tokens. It is trained beside the fusion encoder and left out of the exported
folder, which retrieves.

Legend: M masked tokens, W width of the fused tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlscale.models.rows import wide

PREFIX = "masked_head."  # of its weights in the dual encoder's state dict


class MaskedHead(nn.Module):
    """BERT's: a layer, its norm, and a score for every word."""

    def __init__(self, width: int, words: int):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.scores = nn.Linear(width, words)
        for linear in (self.transform[0], self.scores):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Fused tokens (M, W) and the words that stood there (M,) to -log p of these (M,): the (M, words) scores end
        here, since those of a whole batch would be larger than its activations."""
        return F.cross_entropy(wide(self.scores(self.transform(tokens))), words, reduction="none")
