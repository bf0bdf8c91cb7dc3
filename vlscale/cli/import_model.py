"""`vlscale import ...`: checkpoints of other libraries as Hugging Face folders."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make Hugging Face folders from checkpoints of other libraries.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps `open-clip` a subcommand while it is the only one."""


@app.command("open-clip")
def open_clip(
    checkpoint: Annotated[Path, typer.Argument(help="A safetensors file, as open_clip_model.safetensors.")],
    config: Annotated[Path, typer.Argument(help="open_clip_config.json, or one of open_clip's model configs.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; new or empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder, or open_clip's merges file; default: the installed open_clip's."),
    ] = None,
) -> None:
    """A ViT model of open_clip as a CLIPModel folder, a starting point for model.init_from and teachers."""
    from vlscale.export.open_clip import import_open_clip

    print(f"imported: {import_open_clip(checkpoint, config, out, tokenizer).resolve()}")
