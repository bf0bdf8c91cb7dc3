"""How far a teacher can be trusted: whether it sees the same relations when the samples are shown another way.

Of a picture another augmented view, of a sample another caption. A relation that does not survive that is the view's or
the wording's, not the sample's, and there is no use in holding a student to it.

Legend: n samples, D width of the teacher.
"""

import torch


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of the relations among `first` (n, D) with those among `second` (n, D), unit rows of the same samples shown in
    two ways: the correlation of a sample's n - 1 cosines, mean over samples. 1: the same; 0: chance, and never less."""
    correlations = (_standardised(first) * _standardised(second)).sum(1)
    return max(0.0, float(correlations.mean()))


def _standardised(rows: torch.Tensor) -> torch.Tensor:
    """(n, n - 1) cosines, each row without its own, of mean 0 and length 1; zeros where all are alike."""
    rows, n = rows.detach().double(), len(rows)
    cosines = (rows @ rows.T)[~torch.eye(n, dtype=torch.bool, device=rows.device)].view(n, n - 1)
    centred = cosines - cosines.mean(1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return torch.where(lengths > 1e-9, centred / lengths.clamp(min=1e-9), 0.0)
