"""Pictures of the report: small JPEGs inside the file, always encoded anew, so that no byte of an input passes on."""

import base64
import io

from PIL import Image

SIDE = 160  # pixels of the longer side


def data_uri(encoded: bytes | None) -> str | None:
    """A `data:` URI of at most SIDE pixels; None for what cannot be read as a picture."""
    if encoded is None:
        return None
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
