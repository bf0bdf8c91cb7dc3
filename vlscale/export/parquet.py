"""An index as parquet: one row an image (key, captions, image_emb, text_emb), one row group a part; needs pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlscale.export.index_file import Header, Rows

HEADER = b"vlscale"  # key in the file's metadata


def write_parquet(path: Path, header: Header, parts: Iterator[Rows]) -> None:
    vector = pa.list_(pa.from_numpy_dtype(np.dtype(header.dtype)), header.embed_dim)
    columns = {
        "key": pa.string(),
        "captions": pa.list_(pa.string()),
        "image_emb": vector,
        "text_emb": pa.list_(vector),
    }
    schema = pa.schema(list(columns.items()), metadata={HEADER: header.to_json()})
    with pq.ParquetWriter(path, schema) as writer:
        for rows in parts:
            ends = np.concatenate([[0], rows.counts.cumsum()]).astype(np.int32)
            vectors = [
                pa.FixedSizeListArray.from_arrays(pa.array(emb.reshape(-1)), header.embed_dim)
                for emb in (rows.image_emb, rows.text_emb)
            ]
            arrays = [
                pa.array(rows.keys.tolist(), pa.string()),
                pa.ListArray.from_arrays(ends, pa.array(rows.captions.tolist(), pa.string())),
                vectors[0],
                pa.ListArray.from_arrays(ends, vectors[1]),
            ]
            writer.write_table(
                pa.table([pa.array(a).cast(t) for a, t in zip(arrays, schema.types, strict=True)], schema)
            )


def read_parquet(path: Path, only_header: bool) -> dict[str, Any]:
    """The fields of an `Index`. Raises KeyError or ValueError (pyarrow's own is one) for what is none."""
    header = Header.from_json(pq.read_schema(path).metadata[HEADER].decode())
    if only_header:
        return {"header": header}
    table = pq.read_table(path).combine_chunks()
    captions, text_emb = (table[name].combine_chunks() for name in ("captions", "text_emb"))
    counts = np.diff(captions.offsets.to_numpy())
    return {
        "header": header,
        "keys": np.array(table["key"].to_pylist()),
        "captions": np.array(captions.flatten().to_pylist()),
        "text_image": np.repeat(np.arange(len(counts)), counts),
        "image_emb": _matrix(table["image_emb"].combine_chunks(), header),
        "text_emb": _matrix(text_emb.flatten(), header),
    }


def _matrix(vectors: pa.FixedSizeListArray, header: Header) -> np.ndarray:
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, header.embed_dim)
