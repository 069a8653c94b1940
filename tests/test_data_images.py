"""Images become inputs as stated; what Pillow and numpy make of the same files in float64 is expected."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from PIL import Image, ImageDraw

import qcompile
from qcompile import verbs
from qcompile.data import Dataset, InputSpec, open_data
from qcompile.errors import BadInput

F32 = np.dtype(np.float32)
RGB = InputSpec("image", ("N", 3, 6, 8), F32)
AS_READ = "[inputs.image]\n"


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def described(folder: Path, text: str, head: str = 'file = "images"') -> Path:
    path = folder / "data.toml"
    path.write_text(f"{head}\n{text}")
    return path


def drain(data: Dataset, name: str = "image") -> NDArray[np.generic]:
    return np.concatenate([batch[name] for batch in data])


def test_a_folder_is_read_in_the_order_of_names_and_normalized_as_stated(tmp_path: Path) -> None:
    names = ("b/1.png", "a/2.bmp", "a/10.PNG", "c.ppm")
    pixels = {n: save(tmp_path / "images" / n, noise(6, 8, seed=i)) for i, n in enumerate(names)}
    for extra in ("readme.md", "a/.hidden.png", ".cache/x.png"):
        path = tmp_path / "images" / extra
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    text = "[inputs.image]\nscale = 0.00392156862745098\nmean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.25, 0.5]"
    data = open_data(described(tmp_path, text), [RGB])
    stack = np.stack([pixels[n] for n in ("a/10.PNG", "a/2.bmp", "b/1.png", "c.ppm")]).astype(float)
    wanted = (stack / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
    got = drain(data)
    assert (got.dtype, data.count) == (F32, 4)
    np.testing.assert_allclose(got, wanted.transpose(0, 3, 1, 2), atol=1e-6)
    last = open_data(tmp_path / "data.toml", [InputSpec("image", (None, 6, 8, 3), F32)])
    np.testing.assert_allclose(drain(last), wanted, atol=1e-6)


def test_what_was_read_and_how_is_recorded(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", noise(20, 20, seed=i))
    text = '[inputs.image]\nresize = 9\ncrop = [6, 8]\nchannels = "bgr"\nmean = [1, 2, 3]'
    about = open_data(described(tmp_path, text), [RGB], samples=2).about
    assert about == {
        "source": "data.toml",
        "available": 3,
        "inputs": {
            "image": {
                "file": "images", "kind": "images", "files": 3, "filter": "bilinear", "layout": "nhwc", "resize": [9],
                "crop": [6, 8], "channels": "bgr", "mean": [1.0, 2.0, 3.0],
            }
        },
        "versions": {"pillow": Image.__version__},
    }  # fmt: skip


def triangle(image: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear resizing in float64, the filter widened where the image shrinks."""
    for axis, size in ((0, height), (1, width)):
        source = image.shape[axis]
        ratio = source / size
        centres = (np.arange(size) + 0.5) * ratio
        distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(ratio, 1.0)
        weights = np.maximum(1.0 - distance, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    short=st.integers(6, 30),
    seed=st.integers(0, 99),
)
def test_resize_keeps_the_aspect_and_crop_takes_the_middle(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, short: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    pixels = save(folder / "images" / "x.png", noise(height, width, seed=seed)).astype(float)
    # the longer side in proportion, rounded down
    h, w = (short, short * width // height) if height <= width else (short * height // width, short)
    text = f"[inputs.image]\nresize = {short}\ncrop = [6, 6]"
    got = drain(open_data(described(folder, text), [InputSpec("image", (1, 6, 6, 3), F32)]))[0]
    top, left = round((h - 6) / 2), round((w - 6) / 2)
    wanted = triangle(pixels, h, w)[top : top + 6, left : left + 6]
    # Pillow rounds to whole numbers twice, once for each axis
    assert np.abs(got - wanted).max() <= 1.01
    whole = Image.fromarray(noise(height, width, seed=seed)).resize(
        (w, h), Image.Resampling.BILINEAR
    )
    np.testing.assert_array_equal(got, np.asarray(whole)[top : top + 6, left : left + 6])


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest"])
def test_the_filter_is_the_one_stated(tmp_path: Path, name: str) -> None:
    pixels = save(tmp_path / "images" / "x.png", noise(17, 23))
    text = f'[inputs.image]\nresize = [6, 8]\nfilter = "{name}"'
    got = drain(open_data(described(tmp_path, text), [InputSpec("image", (1, 6, 8, 3), F32)]))
    how = Image.Resampling[name.upper()]
    np.testing.assert_array_equal(got[0], np.asarray(Image.fromarray(pixels).resize((8, 6), how)))


def test_channels_are_ordered_and_made_as_stated(tmp_path: Path) -> None:
    pixels = save(tmp_path / "images" / "x.png", noise(6, 8))
    swapped = drain(open_data(described(tmp_path, '[inputs.image]\nchannels = "bgr"'), [RGB]))
    np.testing.assert_array_equal(swapped[0], pixels[..., ::-1].transpose(2, 0, 1))
    gray = described(tmp_path, '[inputs.image]\nchannels = "gray"')
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    for shape in ((1, 1, 6, 8), (1, 6, 8, 1), (1, 6, 8), (1, 48), (1, 1, 48)):
        got = drain(open_data(gray, [InputSpec("image", shape, F32)]))
        assert got.shape == shape
        assert np.abs(got.reshape(6, 8) - luma).max() < 1.0
    for shape in ((1, 3, 6, 8), (1, 6, 9), (1, 144)):
        with pytest.raises(BadInput, match="does not fit input"):
            open_data(gray, [InputSpec("image", shape, F32)])
    with pytest.raises(BadInput, match="does not fit input"):
        open_data(described(tmp_path, AS_READ), [InputSpec("image", (1, 144), F32)])


def test_images_of_other_modes_are_converted_only_when_that_is_stated(tmp_path: Path) -> None:
    pixels = noise(6, 8)
    alpha = np.dstack([pixels, noise(6, 8, 1, seed=1)])
    palette = Image.fromarray(pixels).quantize(16)
    palette.info["transparency"] = bytes(range(16))
    (tmp_path / "images").mkdir()
    place = tmp_path / "images" / "x.png"
    made = {
        "RGBA": (Image.fromarray(alpha), pixels),
        "P": (palette, np.asarray(palette.convert("RGBA"))[..., :3]),
        "1": (Image.fromarray(pixels[..., 0] > 99), np.repeat((pixels[..., :1] > 99) * 255, 3, 2)),
    }
    for mode, (image, wanted) in made.items():
        image.save(place)
        with pytest.raises(BadInput, match=f"of mode {mode}: state channels"):
            open_data(described(tmp_path, AS_READ), [RGB])
        got = drain(open_data(described(tmp_path, '[inputs.image]\nchannels = "rgb"'), [RGB]))
        np.testing.assert_array_equal(got[0], wanted.transpose(2, 0, 1))
    Image.fromarray(pixels.astype(np.uint16)[..., 0] * 200).save(place)
    with pytest.raises(BadInput, match="mode I;16; images of 8 bits"):
        open_data(described(tmp_path, '[inputs.image]\nchannels = "gray"'), [RGB])


def test_labels_are_the_folders_or_a_file_of_their_own(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/0.png", "cat/3.png", "cat/1.png", "emu/2.png")):
        save(tmp_path / "images" / name, noise(6, 8, seed=i))
    data = open_data(described(tmp_path, AS_READ, 'file = "images"\nlabels = "folders"'), [RGB])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 2]
    (tmp_path / "y.txt").write_text("# labels\n7\n8\n\n9\n10\n")
    np.save(tmp_path / "some.npy", np.array([3, 0]))
    head = 'file = "images"\nlabels = "y.txt"\nindex = "some.npy"\nmetric = "top1"'
    data = open_data(described(tmp_path, AS_READ, head), [RGB])
    assert data.labels is not None
    assert (data.labels.tolist(), data.metric, data.count) == ([7, 10], "top1", 2)
    np.testing.assert_array_equal(drain(data)[0], noise(6, 8, seed=2).transpose(2, 0, 1))
    for labels, words in (
        ("z.txt", "does not exist"),
        ("../y.txt", "outside"),
        ("y", "beside them"),
    ):
        with pytest.raises(BadInput, match=words):
            open_data(described(tmp_path, AS_READ, f'file = "images"\nlabels = "{labels}"'), [RGB])
    (tmp_path / "y.txt").write_text("7\n8\ncat\n9\n")
    with pytest.raises(BadInput, match="whole number in each line"):
        open_data(described(tmp_path, AS_READ, head), [RGB])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A gray image whose header is true and whose pixels are missing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def encoded(form: str, pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.png", encoded("PNG", noise(60, 80))[:2000], "cut.png.*cannot be read as an image"),
        ("cut.jpg", encoded("JPEG", noise(60, 80))[:2000], "cut.jpg.*cannot be read as an image"),
        ("nothing.png", b"", "nothing.png.*cannot be read"),
        ("text.jpg", b"not an image at all", "text.jpg.*cannot be read"),
        ("gif.png", encoded("GIF", noise(6, 8)), "gif.png.*cannot be read"),
        ("bomb.png", png(60_000, 60_000), "bomb.png"),
        ("large.png", png(8400, 8400), "large.png' has 8400 x 8400 pixels"),
        ("missing.png", png(6, 8), "missing.png.*cannot be read"),
        ("strip.png", encoded("PNG", noise(1, 1000)), "resized to .* too many"),
        ("p6.ppm", b"P6 99999 99999 255\n" + bytes(99), "p6.ppm"),
        ("crc.png", encoded("PNG", noise(60, 80)).replace(b"IDAT", b"IDAX", 1), "crc.png"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_files_that_are_no_images_or_bombs(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    save(tmp_path / "images" / "a.png", noise(300, 300))
    (tmp_path / "images" / name).write_bytes(content)
    text = '[inputs.image]\nresize = 280\ncrop = [6, 8]\nchannels = "rgb"'
    with pytest.raises(BadInput, match=words):
        open_data(described(tmp_path, text), [RGB])


def test_what_does_not_go_together_is_said_in_a_sentence(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(6, 8))
    with pytest.raises(BadInput, match=r"has to be stated: write a \.toml description"):
        open_data(tmp_path / "images", [RGB])
    save(tmp_path / "images" / "b.png", noise(5, 8))
    with pytest.raises(
        BadInput, match=r"b\.png' is 8 x 5 pixels of 3 channels, and the first image"
    ):
        open_data(described(tmp_path, AS_READ), [RGB])
    save(tmp_path / "images" / "b.png", noise(6, 8, 1))
    with pytest.raises(
        BadInput, match=r"b\.png' is 8 x 6 pixels of 1 channel, .* state resize, crop"
    ):
        open_data(described(tmp_path, AS_READ), [RGB])
    for text, words in (
        ("crop = 7", "6 pixels where 7 x 7 are to be cropped"),
        ('filter = "bicubic"', "state resize as well"),
        ('filter = "bilinaer"', "did you mean 'bilinear'"),
        ('channels = "mono"', "mono is for audio"),
        ("window = 3", "window is not for images"),
        ("resize = [1, 2, 3]", "up to 2"),
        ("resize = 0", "positive"),
        ("crop = 2.5", "positive"),
    ):
        with pytest.raises(BadInput, match=words):
            open_data(described(tmp_path, AS_READ + text), [RGB])
    np.save(tmp_path / "images" / "c.npy", np.zeros(3))
    with pytest.raises(BadInput, match="arrays and images: give one kind"):
        open_data(described(tmp_path, AS_READ), [RGB])


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "images" / "a.png", noise(6, 8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match=r"pip install 'qcompile\[images\]'"):
        open_data(described(tmp_path, AS_READ), [RGB])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_damage_anywhere_is_an_error_in_a_sentence_or_no_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    picture = Image.new("RGB", (8, 6), "navy")
    ImageDraw.Draw(picture).line((0, 0, 7, 5), "red")
    form, suffix = data.draw(
        st.sampled_from([("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("PPM", "ppm")])
    )
    content = bytearray(encoded(form, np.asarray(picture)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for old in (folder / "images").iterdir():
        old.unlink()
    (folder / "images" / f"x.{suffix}").write_bytes(bytes(content))
    try:
        got = drain(open_data(described(folder, '[inputs.image]\nchannels = "rgb"'), [RGB]))
    except BadInput:
        return
    assert got.shape == (1, 3, 6, 8)


def test_a_network_is_calibrated_scored_and_reproduced_from_folders_of_images(
    models: Path, tmp_path: Path
) -> None:
    for part, rows in (("calib", 40), ("eval", 100)):
        with np.load(models / "digits-dscnn" / f"{part}.npz") as arrays:
            # sixteenths become multiples of 15
            pixels = (arrays["image"][:rows, 0] * 240).astype(np.uint8)
            labels = arrays["y"][:rows] if part == "eval" else np.zeros(rows, int)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            save(tmp_path / part / str(label) / f"{i:03}.png", image)
        (tmp_path / f"{part}.toml").write_text(
            f'file = "{part}"\nlabels = "folders"\nmetric = "top1"\n[inputs.image]\nscale = {1 / 240!r}'
        )
    model = models / "digits-dscnn" / "model.onnx"
    made = qcompile.compile(
        model, "x86", tmp_path / "calib.toml", "fast", tmp_path / "out", samples=36
    )
    data = made.manifest["data"]
    assert isinstance(data, dict)
    assert (data["origin"], data["samples"], data["read"]["available"]) == ("files", 36, 40)
    assert data["read"]["inputs"]["image"] == {
        "file": "calib", "kind": "images", "files": 40, "layout": "nhwc", "scale": 1 / 240,
    }  # fmt: skip
    assert made.report["data"] == data
    assert made.report["warnings"] == []
    (row,) = verbs.evaluate(made.folder, tmp_path / "eval.toml")["outputs"]  # type: ignore[misc]
    ran = InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(models / "digits-dscnn" / "eval.npz") as arrays:
        (logits,) = ran.run(None, {"image": arrays["image"][:100]})
        right = float((logits.argmax(1) == arrays["y"][:100]).mean())
    assert (row["samples"], row["metric"], row["float"]) == (100, "top1", pytest.approx(right))
    assert row["agreement"] > 0.9
    again = verbs.reproduce(made.folder / "manifest.json", calibration=tmp_path / "calib.toml")
    assert again.identical
