"""`vlscale data ...`: make, import, check and index corpora, and embed them by teachers."""

from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.corpus import CaptionKey, ImageKeys, ManifestDir, Urls, corpus
from vlscale.cli.outputs import prepare
from vlscale.cli.teach import teach

app = typer.Typer(help="Make, import, check and index corpora, and embed them by teachers.", no_args_is_help=True)
importers = typer.Typer(help="Make shards from a public source.", no_args_is_help=True)
app.add_typer(importers, name="import")
app.command()(teach)

Processes = Annotated[int | None, typer.Option(help="Default: one a core.")]


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    pairs: Annotated[int, typer.Option(help="Training pairs.")] = 12_000,
    val_pairs: Annotated[int, typer.Option(help="Held-out pairs, of scenes that training never shows.")] = 1_000,
    preset: Annotated[str, typer.Option(help="clean, text-noisy, text-generic or image-weak.")] = "clean",
    caption_dropout: Annotated[
        float | None, typer.Option(help="Chance that a mention leaves an attribute out.")
    ] = None,
    caption_noise: Annotated[float | None, typer.Option(help="Chance that an attribute is said wrongly.")] = None,
    never_said: Annotated[
        list[str] | None, typer.Option(help="An attribute that no caption mentions; repeat for more.")
    ] = None,
    occlusion: Annotated[float | None, typer.Option(help="Share of each picture that is covered.")] = None,
    blur: Annotated[float | None, typer.Option(help="Blur, sigma in 32nds of the side.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 32,
    seed: Annotated[int, typer.Option()] = 0,
    shard_size: Annotated[int, typer.Option(help="Pairs a shard.")] = 1_000,
    processes: Annotated[int | None, typer.Option(help="Default: one a core, for corpora that are worth it.")] = None,
) -> None:
    """Make a procedural scene corpus, with ground-truth relevance, as webdataset shards."""
    from vlscale.data.synth import make_corpus, synth_config

    config = synth_config(
        preset,
        pairs=pairs,
        val_pairs=val_pairs,
        caption_dropout=caption_dropout,
        caption_noise=caption_noise,
        never_said=tuple(never_said) if never_said else None,
        occlusion=occlusion,
        blur=blur,
        resolution=resolution,
        seed=seed,
        shard_size=shard_size,
    )
    make_corpus(out, config, processes=processes)
    typer.echo(f"{out}: {pairs:,} training pairs and {val_pairs:,} held-out pairs")


@app.command()
def index(
    urls: Urls,
    image_keys: ImageKeys = "jpg,jpeg,png,webp",
    caption_key: CaptionKey = "txt",
    manifest_dir: ManifestDir = None,
    processes: Processes = None,
) -> None:
    """Index shards ahead of training; a second run goes on where one was stopped."""
    from vlscale.data.indexing import index_shards

    shards, data = corpus(urls, image_keys, caption_key, manifest_dir)
    manifest = index_shards(shards, data, processes=processes)
    typer.echo(f"{len(shards):,} shards, {manifest.num_samples:,} samples, hash {manifest.hash}")
    for reason, count in manifest.skipped.most_common():
        typer.echo(f"left out {count:,}: {reason}")


@app.command()
def check(
    urls: Urls,
    image_keys: ImageKeys = "jpg,jpeg,png,webp",
    caption_key: CaptionKey = "txt",
    manifest_dir: ManifestDir = None,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Count pictures that look the same.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of samples to this picture.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything found to this file.")] = None,
    processes: Processes = None,
) -> None:
    """Read every member and unpack every picture: counts, sizes, caption lengths, and what is wrong."""
    import json

    from vlscale.data.check import check_corpus
    from vlscale.data.contact_sheet import save_contact_sheet
    from vlscale.data.manifest import build_manifest

    prepare("--json", json_file)
    prepare("--sheet", sheet)
    shards, data = corpus(urls, image_keys, caption_key, manifest_dir)
    report = check_corpus(shards, data, duplicates=duplicates, processes=processes)
    summary = report.summary()
    for name, value in summary.items():
        if name not in ("named", "bad_shards", "incomplete") and value is not None:
            typer.echo(f"{name:>20}  {_line(value)}")
    for line in [*report.bad_shards, *report.incomplete, *report.named]:
        typer.echo(f"  {line}")
    if json_file:
        json_file.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    if report.bad_shards:
        raise ValueError(
            f"{len(report.bad_shards)} of {report.shards} shards cannot be used; the first: {report.bad_shards[0]}"
        )
    if sheet:
        save_contact_sheet(sheet, build_manifest(shards, data), data)


def _line(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(part)}" for name, part in value.items()) or "none"
    return f"{value:,}"


@importers.command()
def emoji(
    png_dir: Annotated[Path, typer.Argument(help="A checkout of Noto Emoji, or its folder png/128.")],
    cldr_dir: Annotated[Path, typer.Argument(help="A checkout of Unicode CLDR that also holds emoji-test.txt.")],
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Make the emoji corpus: pictures, names, keywords, groups and concepts."""
    from vlscale.data.emoji import import_emoji

    count = import_emoji(png_dir, cldr_dir, out)
    typer.echo(
        f"{out}: {count.train:,} training and {count.val:,} held-out emoji, {count.unknown:,} pictures without a name"
    )


Annotations = Annotated[Path, typer.Argument(help="The annotation file.")]
ImageRoot = Annotated[Path, typer.Argument(help="The folder that its picture paths start from.")]
Out = Annotated[Path, typer.Argument(help="A new or empty folder.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples a shard.")]


@importers.command()
def karpathy(
    annotations: Annotations,
    image_root: ImageRoot,
    out: Out,
    restval: Annotated[bool, typer.Option(help="Let COCO's restval train, as most papers do.")] = True,
    shard_size: ShardSize = 1_000,
) -> None:
    """Shards of Flickr30K or COCO by Karpathy's splits (dataset_flickr30k.json, dataset_coco.json)."""
    from vlscale.data.importers import karpathy_items, write_items

    _tell_import(out, write_items(karpathy_items(annotations, restval=restval), image_root, out, shard_size=shard_size))


@importers.command()
def lists(
    annotations: Annotations,
    image_root: ImageRoot,
    out: Out,
    split: Annotated[str, typer.Option(help="First part of the shards' names.")] = "train",
    shard_size: ShardSize = 1_000,
) -> None:
    """Shards of a list of {image, caption}, as JSON, .csv or .tsv, or of COCO's and VizWiz's tables; one sample a
    picture."""
    from vlscale.data.importers import list_items, write_items

    _tell_import(out, write_items({split: list_items(annotations)}, image_root, out, shard_size=shard_size))


def _tell_import(out: Path, count) -> None:
    parts = ", ".join(f"{number:,} {split}" for split, number in count.samples.items())
    lost = f"; {len(count.missing):,} pictures missing, {count.captionless:,} without a caption"
    typer.echo(f"{out}: {parts} samples{lost if count.missing or count.captionless else ''}")
