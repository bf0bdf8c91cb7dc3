"""What structure-aware distillation learns beside the student: projections of the frozen teachers' embeddings, and the
weight by which their relations are mixed (RVLR, arXiv 2412.10761, section 3; METHOD: E = w T_text + (1 - w) T_image).

It lives in the model so that the optimizer and the checkpoints have it, and is left out of the exported folder.

Legend: B pairs, D embedding width.
"""

from typing import NamedTuple

import torch
from torch import nn

from vlscale.models.rows import unit, wide

PREFIX = "teacher_heads."  # of its weights in the model's state dict


class TeacherRows(NamedTuple):
    image: torch.Tensor  # (B, D) the image teacher's embeddings, projected, L2-normalised
    text: torch.Tensor  # (B, D)
    text_share: torch.Tensor  # (), w in (0, 1): how much of the mixture is the text teacher's


class TeacherHeads(nn.Module):
    def __init__(self, image_width: int, text_width: int, embed_dim: int):
        super().__init__()
        self.image_projection = nn.Linear(image_width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_width, embed_dim, bias=False)
        for linear in (self.image_projection, self.text_projection):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.mixture = nn.Parameter(torch.zeros(1))  # the logit of w, which starts at one half

    def forward(self, teacher_image: torch.Tensor, teacher_text: torch.Tensor) -> TeacherRows:
        """Frozen embeddings (B, D_teacher) of both teachers."""
        return TeacherRows(
            unit(self.image_projection(teacher_image)),
            unit(self.text_projection(teacher_text)),
            torch.sigmoid(wide(self.mixture)).squeeze(),
        )
