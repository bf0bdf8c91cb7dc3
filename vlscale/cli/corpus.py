"""How a command is told which shards to read: the options, and what they mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vlscale.sections import DataConfig

Urls = Annotated[list[str], typer.Argument(help="Shards: paths, folders, brace lists, globs; `::` joins several.")]
ImageKeys = Annotated[str, typer.Option(help="Extensions of the picture, the first that a sample has.")]
CaptionKey = Annotated[str, typer.Option(help="Extension of the caption, or json:FIELD.")]
ManifestDir = Annotated[Path | None, typer.Option(help="Where indexes are kept; default: beside the shards.")]


def corpus(
    urls: list[str], image_keys: str, caption_key: str, manifest_dir: Path | None
) -> tuple[list[str], "DataConfig"]:
    """(shards, data config) of a command's arguments."""
    from vlscale.data.urls import expand
    from vlscale.sections import DataConfig

    data = DataConfig(
        image_keys=[key.strip() for key in image_keys.split(",") if key.strip()],
        caption_key=caption_key,
        manifest_dir=str(manifest_dir) if manifest_dir else None,
    )
    return expand([part for url in urls for part in url.split("::")], "the shards"), data
