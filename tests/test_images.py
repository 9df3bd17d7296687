"""load_image against what was drawn, PIL and transformers; seen_region against the box worked out by hand."""

import base64
import io
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DetrImageProcessorPil,
    MobileNetV1ImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tve_hf import images
from tve_hf.geometry import normalization, seen_region
from tve_hf.images import load_image
from tve_hf.pipeline_tve import TransferableAttributionPipeline

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2  # no symmetry, not square


def encode(image, file_format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


@pytest.fixture
def png():
    return encode(Image.fromarray(PIXELS))


@pytest.fixture
def site(png, monkeypatch):
    """A server on this machine: /image.png is an image, /page is a page, anything else is missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/image.png": png, "/page": b"<html>please log in</html>"}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or png)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_source_gives_the_same_image(png, site, tmp_path):
    path = tmp_path / "images.of.cats.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    sources = [
        path,
        str(path),
        f"{site}/image.png",
        text,
        base64.encodebytes(png).decode(),
        f"data:image/png;base64,{text}",
        Image.fromarray(PIXELS),
        {"bytes": png, "path": None},
        {"bytes": None, "path": str(path)},
    ]
    for source in sources:
        image = load_image(source, timeout=5)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


# How the EXIF standard stores an upright image: where the 0th row and the 0th column of what is stored lie.
STORED = {
    1: lambda u: u,  # top, left
    2: lambda u: u[:, ::-1],  # top, right
    3: lambda u: u[::-1, ::-1],  # bottom, right
    4: lambda u: u[::-1],  # bottom, left
    5: lambda u: u.swapaxes(0, 1),  # left, top
    6: lambda u: u.swapaxes(0, 1)[::-1],  # right, top
    7: lambda u: u.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda u: u.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    data = encode(stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image({"bytes": data, "path": None})), PIXELS)
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_eight_bit_modes_agree_with_transformers(mode):
    source = Image.fromarray(PIXELS)
    image = source.convert("L").convert(mode) if mode in ("LA", "PA") else source.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(transformers_load_image(image)))


@pytest.mark.filterwarnings("error")
def test_transparent_palette_is_silent():
    image = Image.fromarray(PIXELS).convert("P")
    data = encode(image, transparency=bytes(range(105)))
    np.testing.assert_array_equal(np.asarray(load_image({"bytes": data})), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_ramp_keeps_order_and_span(file_format):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]  # multiples of 257
    image = load_image({"bytes": encode(Image.fromarray(ramp), file_format)})
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(np.asarray(load_image(ramp)), np.asarray(image))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),  # 8 bits in a wide mode: as they are
        (np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),  # 16 bits
        (np.array([[0, 25700, 65535]], np.float32), [0, 100, 255]),
        (np.array([[-100, 0, 155]], np.int32), [0, 100, 255]),  # anything else is stretched
        (np.array([[-1, 0, 4]], np.float32), [0, 51, 255]),
        (np.array([[1e6, 1e6, 1e6]], np.float32), [0, 0, 0]),
    ],
)
def test_wide_modes_are_scaled_by_range(values, expected):
    image = Image.fromarray(values)
    assert image.mode in ("I", "F")
    np.testing.assert_array_equal(np.asarray(load_image(image))[0], np.array(expected)[:, None].repeat(3, 1))


def test_arrays_and_tensors_of_every_layout():
    grey = np.repeat(PIXELS[..., :1], 3, -1)
    alpha = np.concatenate([PIXELS, PIXELS[..., :1]], -1)
    layouts = [
        (PIXELS, PIXELS),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (PIXELS[..., 0], grey),
        (PIXELS[..., :1], grey),
        (PIXELS[None, ..., 0], grey),
        (alpha, PIXELS),
        (alpha.transpose(2, 0, 1), PIXELS),
    ]
    for array, expected in layouts:
        for value in (array, array / 255, array.astype(np.float32) / 255):
            np.testing.assert_array_equal(np.asarray(load_image(value)), expected)
            np.testing.assert_array_equal(np.asarray(load_image(torch.tensor(value))), expected)
    tensor = torch.tensor(PIXELS / 255, dtype=torch.bfloat16, requires_grad=True)
    assert np.abs(np.asarray(load_image(tensor)).astype(int) - PIXELS).max() <= 1


def test_ambiguous_layout_follows_the_library():
    cube = np.arange(3 * 7 * 3, dtype=np.uint8).reshape(3, 7, 3)
    assert load_image(cube).size == (7, 3)  # (H, W, C)
    assert load_image(torch.tensor(cube)).size == (3, 7)  # (C, H, W)


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.full((4, 5, 3), np.inf), "NaN or infinite"),
        (np.full((4, 5), 255.0), r"\[255, 255\]"),
        (np.zeros((4, 5), np.int64), "int64"),
        (np.zeros((6, 5, 2), np.uint8), r"\(6, 5, 2\)"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"\(2, 3, 4, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, part):
    with pytest.raises(ValueError, match=part):
        load_image(array)
    with pytest.raises(ValueError, match=part):
        load_image(torch.tensor(array))


def test_pil_images_that_are_no_image_are_refused():
    with pytest.raises(ValueError, match=r"size \(0, 5\) has no pixels"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="NaN"):
        load_image(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


@pytest.mark.parametrize("broken", ["corrupt", "truncated", "empty", "text"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_broken_files_are_named(broken, file_format, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    contents = {"corrupt": b"\x01" * 20 + data[20:], "truncated": data[: len(data) // 2], "empty": b"", "text": b"hi"}
    path = tmp_path / "broken.image"
    path.write_bytes(contents[broken])
    with pytest.raises(ValueError, match="broken.image") as error:
        load_image(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert ("empty" in str(error.value)) == (broken == "empty")


@pytest.mark.parametrize("limit", [20, 10])  # 35 pixels: PIL warns above the limit and refuses above twice the limit
def test_decompression_bomb_is_refused(limit, png, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(png)
    for source in (path, {"bytes": png, "path": "bomb.png"}):
        with pytest.raises(ValueError, match="bomb.png.*MAX_IMAGE_PIXELS"):
            load_image(source)


def test_paths_to_nothing_and_to_directories(tmp_path):
    for missing in (tmp_path / "missing.jpg", str(tmp_path / "missing.jpg"), "cat", "cats/tabby", "", "s3://a/b.png"):
        with pytest.raises(FileNotFoundError, match="missing.jpg|cat|tabby|''|s3"):
            load_image(missing)
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load_image("not base64! " * 10_000)
    assert "(120000 characters)" in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"\(8000 characters\)"):
        load_image("abcd" * 2000)


def test_downloads_that_fail(site):
    with pytest.raises(ValueError, match="missing.png.*404"):  # although the body is an image
        load_image(f"{site}/missing.png", timeout=5)
    with pytest.raises(ValueError, match="/page"):
        load_image(f"{site}/page", timeout=5)
    for address in ("http://127.0.0.1:1/cat.jpg", "http://", "http://[/cat.jpg"):
        with pytest.raises(ValueError, match="cannot be downloaded"):
            load_image(address, timeout=5)


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.jpg"
        start = time.monotonic()
        with pytest.raises(ValueError, match="cat.jpg.*cannot be downloaded .*timed out"):
            load_image(address, timeout=0.2)
        assert time.monotonic() - start < 10


def test_no_download_waits_for_ever_unless_asked_to(png, monkeypatch):
    waited = []

    def get(address, timeout, **options):
        waited.append(timeout)
        return images.httpx.Response(200, content=png)

    monkeypatch.setattr(images.httpx, "get", get)
    address = "http://example.org/cat.png"
    load_image(address)
    load_image({"path": address})
    load_image(address, timeout=3)
    load_image(address, timeout=None)
    pipeline = object.__new__(TransferableAttributionPipeline)
    pipeline.image_processor = lambda images, return_tensors: {"pixel_values": torch.zeros(1, 3, 2, 2)}
    pipeline.classifier = SimpleNamespace(dtype=torch.float32, backbone=SimpleNamespace(other_inputs=()))
    pipeline.preprocess(address)
    assert waited == [10, 10, 3, None, 10]


@pytest.mark.parametrize("wrong", [None, 3, ["cat.jpg"], {}, {"path": None, "bytes": None}, {"url": "x"}])
def test_wrong_types_are_refused(wrong):
    with pytest.raises(TypeError, match="is not an image"):
        load_image(wrong)


SIZES = [(500, 375), (375, 500), (300, 300), (10, 7), (1200, 90), (5000, 3001)]


def cropped(size, shortest, crop):
    """Work out the box of a resize of the shortest edge and a centre crop, pixels of the original."""
    box = []
    for side in size:
        resized = int(shortest * side / min(size))
        begin = (resized - crop) // 2 if resized >= crop else -math.ceil((crop - resized) / 2)
        box.append((begin * side / resized, (begin + crop) * side / resized))
    return snapped(size, box)


def snapped(size, box):
    ends = [0.0 if abs(begin) <= 0.5 else begin for begin, _ in box]
    ends += [float(side) if abs(end - side) <= 0.5 else end for (_, end), side in zip(box, size, strict=True)]
    return tuple(ends)


def assert_box(processor, size, expected):
    tolerance = 0.01 * np.array([*size, *size])
    assert (np.abs(np.array(seen_region(processor, size)) - expected) <= tolerance).all()


@pytest.mark.parametrize("size", [*SIZES, (6000, 4000), (1, 1), (2, 3)])
def test_stretched_images_are_seen_whole(size):
    assert seen_region(ViTImageProcessorPil(), size) == (0.0, 0.0, *size)


@pytest.mark.parametrize(
    ("processor", "shortest", "crop"),
    [
        (MobileNetV1ImageProcessorPil(), 256, 224),
        (MobileNetV2ImageProcessorPil(), 256, 224),
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 256, 224),
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.5), 448, 224),
        (CLIPImageProcessorPil(), 224, 224),
        (MobileViTImageProcessorPil(crop_size=300), 224, 300),  # swaps red and blue, and pads with black
    ],
    ids=lambda value: type(value).__name__ if callable(value) else str(value),
)
@pytest.mark.parametrize("size", SIZES)
def test_shortest_edge_and_centre_crop(processor, shortest, crop, size):
    assert_box(processor, size, cropped(size, shortest, crop))


def test_large_image_is_cropped_where_it_should():
    assert_box(MobileNetV2ImageProcessorPil(), (6000, 4000), cropped((6000, 4000), 256, 224))


def test_crop_and_padding_without_resizing():
    processor = CLIPImageProcessorPil(do_resize=False)
    assert_box(processor, (500, 375), (138, 75, 362, 299))
    assert_box(processor, (10, 7), (-107, -109, 117, 115))
    assert_box(processor, (2, 5), (-111, -110, 113, 114))


@pytest.mark.parametrize("size", SIZES)
def test_padding_to_a_square(size):
    processor = DetrImageProcessorPil(
        size={"shortest_edge": 320, "longest_edge": 320}, do_pad=True, pad_size={"height": 320, "width": 320}
    )
    assert_box(processor, size, (0, 0, max(size), max(size)))


@pytest.mark.parametrize("fill", [(0, 0, 0), (255, 255, 255), (124, 116, 104)])
def test_padding_of_any_colour(fill):
    def letterbox(images, return_tensors):
        sheets = [Image.new("RGB", (64, 64), fill) for _ in images]
        for sheet, image in zip(sheets, images, strict=True):
            sheet.paste(image.resize((64, 32), Image.Resampling.BILINEAR), (0, 16))
        return {"pixel_values": torch.stack([torch.tensor(np.array(sheet)).permute(2, 0, 1) for sheet in sheets])}

    assert_box(letterbox, (400, 200), (0, -100, 400, 300))


def test_the_stand_ins_of_large_images_are_left_where_they_are_shown_otherwise():
    """A crop of 600 pixels without any resize is another share of each size."""

    def crop(images, return_tensors):  # small ones, such as those that tell the colours, are enlarged
        whole = [image if min(image.size) > 300 else image.resize((800, 800)) for image in images]
        shown = [np.array(image.crop((100, 50, 400, 350))) for image in whole]
        return {"pixel_values": torch.stack([torch.tensor(pixels).permute(2, 0, 1) for pixels in shown])}

    assert_box(crop, (2400, 2200), (100, 50, 400, 350))


# The processor classes of every image classifier in transformers, as far as they make pixels by PIL.
PROCESSORS = sorted(
    {
        name
        for model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).values()
        if name.endswith("Pil")
    }
    - {"ImageGPTImageProcessorPil"}  # makes tokens
)


@pytest.mark.parametrize("size", [(150, 90), (80, 120)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_small_blocks_land_where_the_region_says(name, size):
    """The truth is where single blocks of the picture come out, which needs neither ramps nor colours."""
    small = {"size": {"height": 96, "width": 64}} if name == "DonutImageProcessorPil" else {}
    try:
        processor = getattr(transformers, name)(**small)
    except ImportError:
        pytest.skip("that of Segformer needs torchvision in transformers before 5.22")
    left, top, right, bottom = seen_region(processor, size)

    def process(picture):
        given = processor(Image.fromarray(picture), return_tensors="pt")
        pixels = given["pixel_values"][0].numpy()
        if pixels.ndim == 2:  # NaFlex: put the patches together again
            rows, columns = given["spatial_shapes"][0].tolist()
            patches = pixels[: rows * columns].reshape(rows, columns, 16, 16, 3)
            pixels = patches.transpose(4, 0, 2, 1, 3).reshape(3, 16 * rows, 16 * columns)
        return pixels

    (width, height), plain = size, np.full((size[1], size[0], 3), 96, np.uint8)
    before, whole = process(plain), 0
    for x, y in [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8), (0.5, 0.5), (0.35, 0.65)]:
        box = [round(x * width) - 5, round(y * height) - 5, round(x * width) + 5, round(y * height) + 5]
        picture = plain.copy()
        picture[box[1] : box[3], box[0] : box[2]] = 160
        change = np.abs(process(picture) - before).sum(0)
        if change[0].any() or change[-1].any() or change[:, 0].any() or change[:, -1].any() or not change.any():
            continue  # cut off
        whole += 1
        row = (change.sum(1) * (np.arange(change.shape[0]) + 0.5)).sum() / change.sum() / change.shape[0]
        column = (change.sum(0) * (np.arange(change.shape[1]) + 0.5)).sum() / change.sum() / change.shape[1]
        assert left + column * (right - left) == pytest.approx((box[0] + box[2]) / 2, abs=0.5)
        assert top + row * (bottom - top) == pytest.approx((box[1] + box[3]) / 2, abs=0.5)
    assert whole >= 2


def test_images_that_are_turned_are_refused():
    processor = transformers.DonutImageProcessorPil(do_align_long_axis=True, size={"height": 64, "width": 48})
    assert_box(processor, (90, 120), (0, 0, 90, 120))
    with pytest.raises(ValueError, match="turns images of this shape"):
        seen_region(processor, (120, 90))


def test_the_class_that_auto_picks(tmp_path):
    MobileNetV2ImageProcessorPil(size={"shortest_edge": 64}, crop_size=56).save_pretrained(tmp_path)
    assert_box(AutoImageProcessor.from_pretrained(tmp_path), (500, 375), cropped((500, 375), 64, 56))


def test_processors_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match="colours"):
        seen_region(lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 3, 8, 8)}, (50, 40))
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        seen_region(lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 5)}, (50, 40))


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        (
            ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 1.6]),
            [0.1, 0.2, 0.3],
            [0.4, 0.5, 1.6],
        ),
        (ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], do_normalize=False), [0, 0, 0], [1, 1, 1]),
        (ViTImageProcessorPil(do_rescale=False, do_normalize=False), [0, 0, 0], [1 / 255] * 3),
        (DetrImageProcessorPil(size={"height": 32, "width": 32}), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (MobileViTImageProcessorPil(), [0, 0, 0], [1, 1, 1]),  # it has no image_mean
    ],
)
def test_normalization_is_what_the_processor_does(processor, mean, std):
    found = normalization(processor)
    assert found[0] == pytest.approx(mean, abs=2e-6)
    assert found[1] == pytest.approx(std, abs=2e-6)
