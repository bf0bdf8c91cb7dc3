"""`vlscale embed`: the embeddings of shards to a file."""

import os
from pathlib import Path
from typing import Annotated

import typer


def embed(
    model: Annotated[str, typer.Argument(help="A run, its final/, or an exported folder.")],
    data: Annotated[list[str], typer.Option(help="Shard urls; repeat for more.")],
    out: Annotated[Path, typer.Option(help="The .npz or .parquet file to write.")],
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    caption_key: Annotated[str | None, typer.Option(help="As data.caption_key.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Pictures and captions as vectors. The same command goes on after an interruption; torchrun's ranks share it."""
    import torch

    from vlscale.export.embed import EmbedRequest, open_job
    from vlscale.progress import LINE_SECONDS, Progress

    rank, ranks, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    job = open_job(EmbedRequest(model, data, out, dtype, caption_key, batch_size, rank, ranks, device))
    name = f"embedding {Path(model).name}"
    shown = rank == 0
    with Progress(name, job.total, "samples", shown=shown, done=job.done, line_seconds=LINE_SECONDS) as bar:
        job.run(bar.advance)
    if rank == 0:
        print(f"index: {out.resolve()}")
