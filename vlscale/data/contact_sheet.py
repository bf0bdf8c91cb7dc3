"""A contact sheet: samples of a corpus with their first captions, as one picture to look at."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlscale.data.check import chosen_rows
from vlscale.data.faults import BadSample
from vlscale.data.images import open_picture
from vlscale.data.manifest import Manifest
from vlscale.data.reader import SampleReader
from vlscale.sections import DataConfig

_COLUMNS = 6
_TILE, _TEXT = 180, 64  # pixels of a picture and of the lines below it
_LETTERS, _LINES, _LINE_HEIGHT = 27, 4, 14
_MARGIN = 6


def save_contact_sheet(path: Path, manifest: Manifest, data: DataConfig, *, count: int = 36) -> None:
    """Samples that cannot be shown are shown as their fault."""
    rows = chosen_rows(manifest, count)
    height = -(-len(rows) // _COLUMNS) * (_TILE + _TEXT)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    reader = SampleReader(manifest, data)
    for number, (shard, row) in enumerate(rows):
        left, top = number % _COLUMNS * _TILE, number // _COLUMNS * (_TILE + _TEXT)
        side = _TILE - 2 * _MARGIN
        try:
            sample = reader.read(shard, row, with_json=False)
            picture, text = (
                ImageOps.pad(open_picture(sample.image, data.max_pixels), (side, side), color="#eee"),
                sample.captions[0],
            )
        except BadSample as fault:
            picture, text = Image.new("RGB", (side, side), "#fbb"), f"{reader.key(shard, row)}: {fault}"
        sheet.paste(picture, (left + _MARGIN, top + _MARGIN))
        lines = textwrap.wrap(text, _LETTERS, max_lines=_LINES, placeholder=" ...")
        for i, line in enumerate(lines):
            draw.text((left + _MARGIN, top + _TILE + i * _LINE_HEIGHT), line, fill="black", font=font)
    reader.close()
    sheet.save(path)
