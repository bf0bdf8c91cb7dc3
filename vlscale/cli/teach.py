"""`vlscale data teach`: teacher embeddings of shards, kept by sample key."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.corpus import CaptionKey, ImageKeys, ManifestDir, Urls, corpus


def teach(
    urls: Urls,
    out: Annotated[Path, typer.Argument(help="The cache's folder; an earlier one of the same teachers goes on.")],
    teacher_image: Annotated[str, typer.Option(help="A run, or a Hugging Face folder with a vision model.")],
    teacher_text: Annotated[str, typer.Option(help="A run, or a Hugging Face folder with a text model.")],
    dtype: Annotated[str, typer.Option(help="What is kept: fp16 or bf16.")] = "fp16",
    compute: Annotated[str, typer.Option(help="What the teachers compute in: fp32 or bf16.")] = "fp32",
    captions: Annotated[str, typer.Option(help="Captions of a sample that are embedded: all or first.")] = "all",
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    image_keys: ImageKeys = "jpg,jpeg,png,webp",
    caption_key: CaptionKey = "txt",
    manifest_dir: ManifestDir = None,
) -> None:
    """Embed a corpus by frozen teachers, for teacher.source=cache. The teachers see every picture unaugmented.

    The same command goes on after an interruption; torchrun's ranks share it, or any processes with RANK and WORLD_SIZE
    set. Give the shards before the folder.
    """
    import torch

    from vlscale.export.teach import TeachRequest, open_job
    from vlscale.models.hf_folder import quiet
    from vlscale.progress import Progress

    shards, data = corpus(urls, image_keys, caption_key, manifest_dir)
    rank, ranks, local, beside = (
        int(os.environ.get(name, n))
        for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    quiet()
    request = TeachRequest(
        shards, data, out, teacher_image, teacher_text, dtype, compute, captions, batch_size, rank, ranks,
        threads=max(1, len(os.sched_getaffinity(0)) // beside),
        device=torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu"),
    )  # fmt: skip
    job = open_job(request)
    with Progress("teaching", job.total, "samples", shown=rank == 0, done=job.done) as bar:
        job.run(bar.advance)
    for kind, count in job.left_out.most_common():
        typer.echo(f"left out {count:,}: {kind}")
    if rank == 0:
        widths = f"widths {job.header.image.width} and {job.header.text.width}"
        share = f" (rank 0's of {ranks})" if ranks > 1 else ""
        typer.echo(f"{out}: {job.total:,} samples{share}, {widths}, {dtype}")
