"""Images in files, resized and cropped as stated, as rows of uint8 pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qcompile.data.reading import Reading
from qcompile.errors import BadInput
from qcompile.npz import WHOLE_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "PPM")
KEYS = ("resize", "crop", "filter", "channels")
DEFAULT_FILTER = "bilinear"
MOST_PIXELS = 1 << 26
"""A larger image is a decompression bomb rather than a sample."""
CONVERTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes of 8 bits at most, which it converts without loss of range."""


@dataclass(frozen=True)
class ImageRows:
    """One image a row, [height, width, channels]."""

    paths: Sequence[Path]
    reading: Reading
    shape: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """One for each file."""
        return [1] * len(self.paths)

    @property
    def row_bytes(self) -> int:
        """The size of one image."""
        return math.prod(self.shape[1:])

    def blocks(self, chosen: NDArray[np.int64], step: int) -> Iterator[NDArray[np.generic]]:
        """The chosen images."""
        for at in range(0, len(chosen), step):
            yield np.stack([self._row(self.paths[i]) for i in chosen[at : at + step]])

    def _row(self, path: Path) -> NDArray[np.uint8]:
        pixels = _pixels(path, self.reading)
        if pixels.shape != self.shape[1:]:
            raise BadInput(
                f"{str(path)!r} {_size(pixels)}, and the first image {_size(np.empty(self.shape[1:]))}: "
                "state resize, crop and channels in the .toml description"
            )
        return pixels


def image_rows(paths: Sequence[Path], reading: Reading) -> ImageRows:
    """The images of some files, of the size of the first one."""
    if reading.filter is not None and reading.resize is None:
        raise BadInput("filter says how images are resized: state resize as well")
    if reading.channels == "mono":
        raise BadInput("channels of images are rgb, bgr or gray; mono is for audio")
    return ImageRows(paths, reading, (len(paths), *_pixels(paths[0], reading).shape))


def versions() -> dict[str, str]:
    """The decoder, which the pixels of a JPEG depend on."""
    return {"pillow": str(_pillow().__version__)}


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as e:
        raise BadInput(
            "images are read by Pillow, which is not installed: pip install 'qcompile[images]'"
        ) from e
    return Image


def _pixels(path: Path, reading: Reading) -> NDArray[np.uint8]:
    pillow = _pillow()
    where = repr(str(path))
    try:
        if path.stat().st_size > WHOLE_BYTES:
            raise BadInput(f"{where} has more than {WHOLE_BYTES} bytes, too many for an image")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadInput(
                        f"{where} has {image.width} x {image.height} pixels; at most "
                        f"{MOST_PIXELS} are read"
                    )
                made = _cropped(
                    where, _resized(where, _colored(where, image, reading), reading), reading
                )
                pixels = np.array(made, np.uint8)
    except BadInput:
        raise
    except Exception as e:
        # decoders raise whatever a damaged file makes them stumble over
        raise BadInput(f"{where} cannot be read as an image: {e}") from e
    pixels = pixels.reshape(made.height, made.width, -1)
    return np.ascontiguousarray(pixels[..., ::-1]) if reading.channels == "bgr" else pixels


def _colored(where: str, image: Image, reading: Reading) -> Image:
    if image.mode not in CONVERTED:
        raise BadInput(
            f"{where} has pixels of mode {image.mode}; images of 8 bits a channel are read: "
            "convert it, or save arrays as .npy"
        )
    if reading.channels is None:
        if image.mode not in ("L", "RGB"):
            raise BadInput(
                f"{where} is neither gray nor RGB, but of mode {image.mode}: state channels = "
                '"rgb", "bgr" or "gray", and it is converted'
            )
        return image
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("L" if reading.channels == "gray" else "RGB")


def _resized(where: str, image: Image, reading: Reading) -> Image:
    """Both sides given: as stated; one: the shorter side, the longer one in proportion and rounded down."""
    if reading.resize is None:
        return image
    if len(reading.resize) == 2:
        height, width = reading.resize
    else:
        short = reading.resize[0]
        least = min(image.size)
        height, width = (short * n // least for n in (image.height, image.width))
    if height * width > MOST_PIXELS:
        raise BadInput(f"{where} would be resized to {width} x {height} pixels, which are too many")
    resampling = _pillow().Resampling
    how = {"bilinear": resampling.BILINEAR, "bicubic": resampling.BICUBIC}.get(
        reading.filter or DEFAULT_FILTER, resampling.NEAREST
    )
    return image.resize((width, height), how)


def _cropped(where: str, image: Image, reading: Reading) -> Image:
    """The middle; where the margins differ, the one that rounds half to even is at the top and at the left."""
    if reading.crop is None:
        return image
    height, width = reading.crop if len(reading.crop) == 2 else reading.crop * 2
    if height > image.height or width > image.width:
        raise BadInput(
            f"{where} is {image.width} x {image.height} pixels where {width} x {height} are to be "
            "cropped out of it: state a larger resize"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _size(pixels: NDArray[np.generic]) -> str:
    height, width, channels = pixels.shape
    return f"is {width} x {height} pixels of {channels} channel{'s'[: channels != 1]}"
