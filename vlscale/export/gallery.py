"""Search results as one HTML file: pictures inside it, every text escaped, no script."""

import base64
import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from vlscale.data.faults import BadSample
from vlscale.data.images import open_picture
from vlscale.data.plain_files import read_pictures
from vlscale.data.reader import SampleReader
from vlscale.data.samples import open_corpus
from vlscale.export.index_file import Header
from vlscale.export.search import Hit, Query
from vlscale.sections import DataConfig

SIDE = 320  # pixels of the longer side

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search: {{ query.text }}</title>
<style>
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
.query img { max-width: 14rem; border-radius: .5rem; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; padding: 0;
     list-style: none; }
li { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: .5rem; padding: .75rem; }
li img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .3rem; }
.none { display: grid; place-items: center; background: color-mix(in srgb, currentColor 8%, transparent); }
p { margin: .5rem 0 0; overflow-wrap: anywhere; }
small { opacity: .75; }
</style>
<h1>{{ hits | length }} nearest to {{ query.text }}</h1>
{% if asked %}<p class="query"><img src="{{ asked }}" alt="the picture that was asked with"></p>{% endif %}
<p><small>{{ model }} over {{ index }}; cosine similarity, best first.</small></p>
<ol>
{% for hit in hits %}<li>
{% if pictures[hit.key] %}<img src="{{ pictures[hit.key] }}" alt="{{ hit.caption or hit.key }}" loading="lazy">
{% elif hit.key %}<div class="none">no picture</div>
{% endif %}{% if hit.caption %}<p>{{ hit.caption }}</p>
{% endif %}
<p><small>{{ loop.index }} · {{ "%.4f" | format(hit.score) }} · {{ "picture" if hit.is_picture else "caption" }}
{%- if hit.key %} ·
{{ hit.key }}{% endif %}</small></p>
</li>
{% endfor %}</ol>
</html>
"""


def picture_finder(header: Header, data: list[str] | None) -> Callable[[Iterable[str]], dict[str, bytes]]:
    """Where the pictures of an index's keys are: in `data`, or where they were embedded from."""
    if header.pictures is not None:
        return partial(read_pictures, Path(data[0] if data else header.pictures))
    if not header.image_keys:  # texts alone
        return lambda keys: {}
    shards = DataConfig(caption_key=header.caption_key, image_keys=header.image_keys)
    return partial(find_pictures, data or header.data, shards)


def find_pictures(urls: list[str], data: DataConfig, keys: Iterable[str]) -> dict[str, bytes]:
    """The encoded pictures of samples by key; those that are not there, or cannot be read, are left out."""
    wanted = set(keys)
    manifest = open_corpus(urls, data, "--data")
    reader, found = SampleReader(manifest, data), {}
    try:
        for shard, count in enumerate(manifest.counts.tolist()):
            if len(found) == len(wanted):
                break
            names = manifest.index(shard)
            for row in range(count):
                key = names.key(row)
                if key not in wanted or key in found:
                    continue
                try:
                    found[key] = reader.read(shard, row, with_json=False).image
                except BadSample:
                    continue
    finally:
        reader.close()
    return found


def write_gallery(out: Path, query: Query, hits: list[Hit], pictures: dict[str, bytes], model: str, index: str) -> None:
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        query=query,
        hits=hits,
        pictures={key: data_uri(encoded) for key, encoded in pictures.items()},
        asked=query.picture and data_uri(query.picture),
        model=model,
        index=index,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(html, encoding="utf-8", errors="replace")  # keys may hold bytes that are no text
    os.replace(partial, out)


def data_uri(encoded: bytes) -> str | None:
    """A small JPEG, encoded anew, so that no byte of an input passes on; None for what cannot be read."""
    try:
        picture = open_picture(encoded)
    except BadSample:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
