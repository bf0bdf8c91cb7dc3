"""`vlscale export`: a run as a Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[str, typer.Argument(help="A run, its final/, or an exported folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; new or empty.")],
    layout: Annotated[
        str | None,
        typer.Option(
            "--as", help="dual-encoder, clip or siglip; default: siglip for SigLIP's towers, else dual-encoder."
        ),
    ] = None,
) -> None:
    """A folder that plain transformers loads, with its processor, tokenizer and model card."""
    from vlscale.export.folder import export_model

    print(f"exported: {export_model(run, out, layout).resolve()}")
