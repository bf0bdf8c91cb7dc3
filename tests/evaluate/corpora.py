"""Small corpora with known structure."""

import torch
from torch.nn.functional import normalize

from vlscale.evaluate import EmbeddedCorpus


def make_corpus(images: int, captions: int, noise: float = 1.0, seed: int = 0, meta=None) -> EmbeddedCorpus:
    """`captions` an image; an image and its captions share a direction, `noise` blurs it."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(images, 16, generator=generator)
    text_image = torch.arange(images).repeat_interleave(captions)

    def noisy(rows: torch.Tensor) -> torch.Tensor:
        return normalize(rows + noise * torch.randn(rows.shape, generator=generator), dim=1)

    return EmbeddedCorpus(
        keys=[f"sample-{place}" for place in range(images)],
        image_emb=noisy(truth),
        text_emb=noisy(truth[text_image]),
        text_image=text_image,
        captions=[f"caption {place}" for place in range(images * captions)],
        meta=meta if meta is not None else [{} for _ in range(images)],
    )
