"""Pictures -> the pixel values that preprocessor_config.json asks for.

Pillow and numpy alone: a model's own image processor may ask for torchvision.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.errors import CompressError

FILES = ("preprocessor_config.json", "processor_config.json")
# What no rule below carries out; a model that was trained with one of these would be fed wrongly.
UNKNOWN = ("rescale_offset", "include_top", "do_pad", "do_reduce_labels", "do_color_quantize")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, rescale, normalize: `[height, width]` pictures to `[channels, height, width]`."""

    resize: tuple[int, int] | None
    shortest: int | None
    crop: tuple[int, int] | None
    resample: int
    rescale: float
    flip_channels: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """The pixel values of one picture, which is already in the model's color mode."""
        size = self.resize
        if self.shortest is not None:
            width, height = picture.size
            short, long = min(width, height), max(width, height)
            other = int(self.shortest * long / short)
            size = (other, self.shortest) if height > width else (self.shortest, other)
        if size is not None:
            picture = picture.resize((size[1], size[0]), Image.Resampling(self.resample))
        pixels = np.atleast_3d(np.asarray(picture))  # [height, width, channels]
        if self.crop is not None:
            pixels = _crop(pixels, *self.crop)
        values: NDArray[Any] = pixels.astype(np.float32) * np.float32(self.rescale)
        if self.flip_channels:
            values = values[..., ::-1]
        if self.mean:
            values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def _crop(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle of a picture, with black around one that is too small."""
    lack = [max(0, want - have) for want, have in zip((height, width), pixels.shape, strict=False)]
    around = [((part + 1) // 2, part // 2) for part in lack]
    pixels = np.pad(pixels, (*around, (0, 0)))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _size(value: object) -> tuple[tuple[int, int] | None, int | None]:
    """`(height, width)` or the shortest edge, from the forms that configs write."""
    if isinstance(value, int):
        return (value, value), None
    if isinstance(value, list) and len(value) == 2:
        return (int(value[0]), int(value[1])), None
    if isinstance(value, dict) and {"height", "width"} <= set(value):
        return (int(value["height"]), int(value["width"])), None
    if isinstance(value, dict) and "shortest_edge" in value:
        return None, int(value["shortest_edge"])
    raise CompressError(f"size {value!r} is neither height and width nor shortest_edge")


def read_preprocessing(directory: Path) -> Preprocessing | None:
    """The rules beside a model, None when it has none.

    Raises:
        CompressError: the file is damaged, or asks for a step that is not carried out here.
    """
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        return None
    try:
        rules: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rules = rules.get("image_processor", rules)
        return _rules(rules)
    except (ValueError, TypeError, AttributeError) as error:
        raise CompressError(f"{path} does not describe an image processor ({error})") from error


def _rules(rules: Mapping[str, Any]) -> Preprocessing:
    unknown = [name for name in UNKNOWN if rules.get(name)]
    if unknown:
        raise CompressError(f"{', '.join(unknown)} is not supported; give pixel values in an .npz")
    resize, shortest = _size(rules.get("size", 224)) if rules.get("do_resize", True) else (None, None)
    crop = None
    if rules.get("do_center_crop", False):
        crop, edge = _size(rules.get("crop_size", 224))
        crop = crop or (edge or 0, edge or 0)
    if shortest is not None and rules.get("crop_pct") and crop is None:
        # ConvNeXt: below 384 pixels, resize a little larger and cut the middle; above, warp.
        if shortest < 384:
            crop, shortest = (shortest, shortest), int(shortest / rules["crop_pct"])
        else:
            resize, shortest = (shortest, shortest), None
    normalize = rules.get("do_normalize", True)
    return Preprocessing(
        resize=resize,
        shortest=shortest,
        crop=crop,
        resample=int(rules.get("resample", Image.Resampling.BILINEAR)),
        rescale=float(rules.get("rescale_factor", 1 / 255)) if rules.get("do_rescale", True) else 1.0,
        flip_channels=bool(rules.get("do_flip_channel_order", False)),
        mean=tuple(rules.get("image_mean", (0.5, 0.5, 0.5))) if normalize else (),
        std=tuple(rules.get("image_std", (0.5, 0.5, 0.5))) if normalize else (),
    )


def open_image(cell: object, where: str, channels: int) -> Image.Image:
    """A picture from a path, the bytes of a Parquet cell, or an array of bytes.

    Raises:
        CompressError: there is no picture there, or its shape is not that of one.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        if isinstance(cell, np.ndarray):
            return Image.fromarray(_pixels(cell)).convert(mode)
        if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
            cell = cell["bytes"]
        source = io.BytesIO(cell) if isinstance(cell, bytes) else Path(str(cell))
        with Image.open(source) as picture:
            return picture.convert(mode)
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise CompressError(f"{where} is not a readable image ({error}); remove it") from error


def _pixels(array: NDArray[Any]) -> NDArray[Any]:
    """`[height, width]` or `[height, width, channels]` bytes, from either order of axes."""
    if array.dtype != np.uint8:
        raise ValueError(f"{array.dtype} pixels; give uint8, or float32 pixel values")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
