"""`vlscale search`: ask an index by text or picture."""

from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.outputs import prepare


def search(
    model: Annotated[str, typer.Argument(help="The model that made the index.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of a picture.")],
    index: Annotated[Path, typer.Option(help="What `vlscale embed` wrote.")],
    k: Annotated[int, typer.Option(help="How many results.")] = 10,
    of: Annotated[str, typer.Option(help="images, texts or both.")] = "images",
    rerank: Annotated[
        int | None, typer.Option(help="Nearest of the other modality that the fusion encoder puts in order.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a gallery to this file.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Shards or folder with its pictures; the index's own by default.")
    ] = None,
) -> None:
    """The nearest pictures or captions, exactly, best first; with --rerank, as the fusion encoder orders them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlscale.export import search as searching
    from vlscale.export.gallery import picture_finder, write_gallery
    from vlscale.export.index_file import read_index
    from vlscale.export.loaded import load_model
    from vlscale.export.rerank import reranked_search

    if of not in list(searching.Of):
        raise ValueError(f"--of {of}: expected {', '.join(searching.Of)}")
    prepare("--html", html)
    asked = searching.read_query(query)
    found = read_index(index)
    loaded = load_model(model)
    searching.check_model(loaded, found, index)
    pictures = picture_finder(found.header, data)
    if rerank is None:
        hits = searching.search(loaded, found, asked, k=k, of=searching.Of(of))
    else:
        hits = reranked_search(loaded, found, asked, pictures, rerank=rerank, k=k, of=searching.Of(of))
    table = Table("", "score", *([] if rerank is None else ["match"]), "of", "key", "caption")
    for place, hit in enumerate(hits, start=1):
        match = [] if rerank is None else ["" if hit.match is None else f"{hit.match:.2f}"]
        words = [f"{hit.score:.4f}", *match, "picture" if hit.is_picture else "caption", hit.key, hit.caption]
        table.add_row(str(place), *(Text("".join(c if c.isprintable() else " " for c in word)) for word in words))
    Console(width=None if Console().is_terminal else 120).print(table)
    if html is not None:
        write_gallery(html, asked, hits, pictures({hit.key for hit in hits}), Path(model).name, index.name)
        print(f"gallery: {html.resolve()}")
