"""Real photographs of any size, as encoded bytes, for sweeps and notebooks."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from PIL import Image

from fastvl_lab.errors import ImageError, MissingExtraError
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import ImageInput

# scikit-image ships these photographs inside its wheel (skimage/data/README.txt has their licences).
PHOTOGRAPHS = {"coffee": "coffee.png", "astronaut": "astronaut.png", "rocket": "rocket.jpg", "cat": "chelsea.png"}


def photo(image: str | Path | bytes, size: tuple[int, int] | None = None) -> bytes:
    """Encoded bytes of a built-in photograph ("coffee", "astronaut", "rocket", "cat"), a file, or bytes.

    size: (width, height) to resize to; the result is then a JPEG of quality 92. Without it, the bytes are untouched. Raises
    `ImageError`.
    """
    data = _photograph(image) if image in PHOTOGRAPHS else ImageInput.of(image).data
    assert isinstance(data, bytes)
    if size is None:
        return data
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"size is {width}x{height}; both sides must be at least 1 pixel")
    picture, encoded = rgb_of(ImageInput(data=data, label=str(image)[:80])), io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def _photograph(name: object) -> bytes:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise MissingExtraError(
            f"the photograph {name!r} comes with scikit-image, which is not installed; pip install 'fastvl-lab[notebooks]', "
            f"or give the path of an image"
        )
    return (Path(package.origin).parent / "data" / PHOTOGRAPHS[str(name)]).read_bytes()
