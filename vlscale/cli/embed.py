"""`vlscale embed`: the embeddings of shards, or of plain pictures and texts, to a file."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.outputs import prepare


def embed(
    model: Annotated[str, typer.Argument(help="A run, its final/, or an exported folder.")],
    out: Annotated[Path, typer.Option(help="The .npz or .parquet file to write.")],
    data: Annotated[list[str] | None, typer.Option(help="Shard urls; repeat for more.")] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of pictures, in place of shards.")] = None,
    texts: Annotated[Path | None, typer.Option(help="A file of texts, one a line, in place of shards.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    caption_key: Annotated[str | None, typer.Option(help="As data.caption_key.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Pictures and captions as vectors; a folder's pictures have their paths in it for keys. The same command goes on
    after an interruption; torchrun's ranks share it."""
    import torch

    from vlscale.export.embed import EmbedRequest, open_job
    from vlscale.progress import LINE_SECONDS, Progress

    prepare("--out", out)
    rank, ranks, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    plain = {"images": images, "texts": texts}
    request = EmbedRequest(model, data or [], out, dtype, caption_key, batch_size, rank, ranks, device, **plain)
    job = open_job(request)
    name = f"embedding {Path(model).name}"
    shown = rank == 0
    with Progress(name, job.total, "samples", shown=shown, done=job.done, line_seconds=LINE_SECONDS) as bar:
        job.run(bar.advance)
    if rank == 0:
        print(f"index: {out.resolve()}")
