"""Read images from anything users pass: one of them, or a list, column or stream for a pipeline."""

import base64
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.utils import httpx  # the HTTP client that transformers itself uses
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from transformers.pipelines.pt_utils import KeyDataset

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor | dict"

# Seconds for each step of a download: to connect, and between two pieces of the answer. As huggingface_hub waits.
TIMEOUT = 10.0

# What HEIC photographs have after their first eight bytes.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def load_image(image: ImageInput, timeout: float | None = TIMEOUT) -> Image.Image:
    """Load one image as upright RGB.

    8-bit images come out exactly as from `transformers.image_utils.load_image`, so predictions agree with its
    pipelines. Images of more than 8 bits are scaled to 8 bits, where transformers would clip them to white:
    16-bit values are divided by 257; floats within 0..1 (mode F) are multiplied by 255; other 32-bit integers and
    floats (modes I and F) stay as they are within 0..255, are divided by 257 within 0..65535, and are otherwise
    stretched, minimum to 0 and maximum to 255. HEIC photographs are read where pillow-heif is installed.

    Args:
        image: a path (~ is the home folder), a file://, http:// or https:// URL, a base64 string or data URL, an
            encoded image as bytes or as a file opened for reading them, a PIL image, an undecoded image of `datasets`
            ({"bytes": ..., "path": ...}), or an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4
            channels: uint8, uint16, or float in [0, 1]. Where both ends of the shape could be channels, a tensor is
            taken as (C, H, W) and an array as (H, W, C).
        timeout: seconds to wait for each step of a download; as long as it takes if None.

    Raises:
        FileNotFoundError: if a path does not exist.
        IsADirectoryError: if a path is a directory.
        TypeError: if the input is none of the above.
        ValueError: if the image cannot be downloaded or decoded, or its shape or values make no image.
    """
    if isinstance(image, _Row):
        return load_image(image.decoded(), timeout)
    name = _name(image)
    if isinstance(image, dict) and image.get("bytes") is not None:
        return _to_rgb(_open(image["bytes"], name), name)
    if isinstance(image, dict) and image.get("path") is not None:
        return load_image(image["path"], timeout)
    if isinstance(image, bytes | bytearray | memoryview) or is_file(image):
        return _to_rgb(_open(_bytes_of(image, name), name), name)
    if isinstance(image, str | os.PathLike):
        return _to_rgb(_open(_read(os.fspath(image), name, timeout), name), name)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(image, name), name)
    if isinstance(image, Image.Image):
        return _to_rgb(image, name)
    if hasattr(image, "__array__"):  # of another library
        return _to_rgb(_from_array(np.asarray(image), name), name)
    raise TypeError(f"{name} is not an image: pass a path, URL, base64 string, PIL image, array or tensor.")


def is_file(image: object) -> bool:
    """Whether this is an open file."""
    return hasattr(image, "read") and not isinstance(image, Image.Image)


def _bytes_of(image: Any, name: str) -> bytes:
    if not is_file(image):
        return bytes(image)
    if getattr(image, "closed", False) or hasattr(image, "encoding"):
        raise ValueError(f"{name} is closed, or open as text: open it with mode 'rb', or pass its path.")
    if image.seekable():
        image.seek(0)  # as PIL does
    return image.read()


def _name(image: object) -> str:
    """Name an input in an error message: what the user typed, shortened."""
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"The {type(image).__name__} of shape {tuple(image.shape)} and dtype {image.dtype}"
    if isinstance(image, Image.Image):
        return f"The {image.mode} image {getattr(image, 'filename', '') or 'in memory'} of size {image.size}"
    if isinstance(image, dict):
        return _name(image["path"]) if image.get("path") else f"The dict with keys {list(image)}"
    if isinstance(image, str | os.PathLike):
        text = os.fspath(image)
        return repr(text) if len(text) <= 200 else f"{text[:60]!r}... ({len(text)} characters)"
    if isinstance(image, bytes | bytearray | memoryview):
        return f"The {type(image).__name__} of length {len(image)}"
    if is_file(image):
        return f"The file {getattr(image, 'name', type(image).__name__)!r}"
    return f"The {type(image).__name__} {reprlib.repr(image)}"


def _read(source: str, name: str, timeout: float | None) -> bytes:
    """Fetch the bytes behind a URL, a path, or base64 text."""
    if source.startswith(("http://", "https://")):
        try:
            response = httpx.get(source, timeout=timeout, follow_redirects=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name} cannot be downloaded ({reason}): check the address and the network.") from error
        if not response.is_success:
            raise ValueError(f"{name} answers with HTTP status {response.status_code}: check it in a browser.")
        return response.content
    if source.startswith("file://"):
        source = url2pathname(urlsplit(source).path)
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        raise IsADirectoryError(f"{name} is a directory: pass a list of the files in it.")
    if os.path.exists(source):
        with open(source, "rb") as file:
            return file.read()
    is_data_url = source.startswith("data:")
    text = source.partition(",")[2] if is_data_url else source
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        data = b""
    # A path may be valid base64 by chance, unless it is too long for a path.
    if data.startswith(_IMAGE_SIGNATURES) or (data and (is_data_url or len(source) > 4096)):
        return data
    raise FileNotFoundError(f"{name} does not exist, nor is it a base64-encoded image: check the path.")


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes): fetch or export it again.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(BytesIO(data))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{name} is too large to be decoded safely: shrink it or, if you trust it, raise "
                f"PIL.Image.MAX_IMAGE_PIXELS (now {Image.MAX_IMAGE_PIXELS})."
            ) from error
        except Exception as error:  # decoders raise almost any class on bytes that they do not expect
            if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
                return _open_heif(data, name)
            raise ValueError(f"{name} is corrupt or in no format that PIL can read: convert it to PNG.") from error


def _open_heif(data: bytes, name: str) -> Image.Image:
    try:
        from pillow_heif import open_heif
    except ImportError:
        raise ValueError(f"{name} is a HEIC photograph: `pip install pillow-heif`, or export it as JPEG.") from None
    try:
        return open_heif(BytesIO(data)).to_pillow()
    except Exception as error:  # as above
        raise ValueError(f"{name} is a HEIC photograph that cannot be read ({error}): export it again.") from error


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    shape = tuple(array.shape)
    first, last = (len(shape) == 3 and shape[axis] in (1, 3, 4) for axis in (0, -1))
    if not (len(shape) == 2 or first or last) or 0 in shape:
        raise ValueError(f"{name} is not one image: pass (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.")
    if isinstance(array, torch.Tensor):
        last = last and not first
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    pixels = np.moveaxis(array, 0, -1) if len(shape) == 3 and not last else array
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = _range(pixels, name)
        if low < -1e-3 or high > 1 + 1e-3:  # some slack for values that were interpolated
            raise ValueError(f"{name} has values in [{low:g}, {high:g}]: scale floats to [0, 1] or cast to uint8.")
        pixels = np.rint(pixels.clip(0, 1) * 255)
    elif pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257)
    elif pixels.dtype != np.uint8:
        raise ValueError(f"{name} has no image dtype: cast it to uint8 (0..255) or to float in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(pixels, np.uint8))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright, scale to 8 bits by the rule that `load_image` documents, and convert to RGB."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: pass an image of at least 1 x 1.")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # as in _open
        raise ValueError(f"{name} is truncated or corrupt ({error}): fetch or export it again.") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        low, high = _range(pixels, name)
        if image.mode == "F" and low >= 0 and 0 < high <= 1:
            image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
        elif image.mode.startswith("I;16") or (low >= 0 and 255 < high <= 65535):
            image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
        elif low < 0 or high > 255:
            stretched = (pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
            image = Image.fromarray(np.rint(stretched).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Palette images with Transparency")  # RGB drops it on purpose
        return image.convert("RGB")


def _range(pixels: np.ndarray, name: str) -> tuple[float, float]:
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name} contains NaN or infinite values: replace them first.")
    return low, high


def images_of(inputs: Any) -> Any:
    """Turn paths, tuples, iterators and columns of `datasets` into a list, a `Dataset` or a generator of images.

    An array or tensor of four dimensions is a list of images.

    Raises:
        ValueError: If there is no image at all.
        TypeError: If a whole data set is passed instead of its column of images.
    """
    if isinstance(inputs, os.PathLike):
        return os.fspath(inputs)
    if is_file(inputs):  # which is an iterator over lines too
        return inputs
    if isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim == 4:
        inputs = list(inputs)
    if isinstance(inputs, KeyDataset):
        inputs = _Rows(inputs, inputs.key)
    elif type(inputs).__module__.startswith("datasets."):
        if not hasattr(inputs, "column_name"):
            raise TypeError(f"A {type(inputs).__name__} was given; pass its column of images, like dataset['image'].")
        has_length = hasattr(inputs, "__len__")
        inputs = _Rows(inputs, inputs.column_name) if has_length else _rows_of(inputs, inputs.column_name)
    if isinstance(inputs, Iterator):
        first = next(inputs, None)
        inputs = [] if first is None else _chain(first, inputs)
    elif isinstance(inputs, tuple):
        inputs = list(inputs)
    if inputs is None or (isinstance(inputs, (list, Dataset)) and hasattr(inputs, "__len__") and not len(inputs)):
        raise ValueError("No image was given; pass a path, URL, PIL image or array, or a list of them.")
    return inputs


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


@contextmanager
def _naming(row: int, column: str) -> Iterator[None]:
    """Say which row of a column it is that cannot be decoded."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of them
        raise ValueError(f"Row {row} of column {column!r} holds no image that can be read ({error}).") from error


class _Rows(Dataset):
    """A column of images, each decoded by `load_image`, so that a bad one can be passed over."""

    def __init__(self, column: Any, name: str):
        self.column = column
        self.name = name

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> "_Row":
        return _Row(self, row)


@dataclass
class _Row:
    rows: _Rows
    number: int

    def decoded(self) -> Any:
        with _naming(self.number, self.rows.name):
            return self.rows.column[self.number]


def _rows_of(column: Iterable[Any], name: str) -> Iterator[Any]:
    """The images of a streamed column, one by one."""
    images, end, row = iter(column), object(), 0
    while True:
        with _naming(row, name):
            image = next(images, end)
        if image is end:
            return
        yield image
        row += 1
