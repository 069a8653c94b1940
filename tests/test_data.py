from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompile import npz
from qcompile.data import BATCH_BYTES, BATCH_ROWS, Dataset, InputSpec, open_data
from qcompile.errors import BadInput

F32 = np.dtype(np.float32)
X = InputSpec("x", ("N", 3), F32)
Batch = dict[str, NDArray[np.generic]]


def drain(data: Dataset, name: str = "x") -> NDArray[np.generic]:
    return np.concatenate([batch[name] for batch in data])


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_comes_in_bounded_batches_as_often_as_asked(tmp_path: Path, save: object) -> None:
    x = noise(2 * BATCH_ROWS + 5, 3)
    assert callable(save)
    save(tmp_path / "d.npz", x=x, y=np.arange(len(x)))
    data = open_data(tmp_path / "d.npz", [X])
    assert (data.origin, data.marked, data.count) == ("files", False, len(x))
    for _ in range(2):
        assert [len(b["x"]) for b in data] == [BATCH_ROWS, BATCH_ROWS, 5]
        np.testing.assert_array_equal(drain(data), x)
    np.testing.assert_array_equal(data.rows(300)["x"], x[:300])
    np.testing.assert_array_equal(data.rows(10_000)["x"], x)
    limited = open_data(tmp_path / "d.npz", [X], samples=300)
    assert limited.count == 300
    assert [len(b["x"]) for b in limited] == [BATCH_ROWS, 300 - BATCH_ROWS]


def test_batches_stay_small_when_rows_are_large(tmp_path: Path) -> None:
    x = noise(40, 3 << 17)
    np.save(tmp_path / "d.npy", x)
    batches = list(open_data(tmp_path / "d.npy", [InputSpec("x", (None, 3 << 17), F32)]))
    assert max(b["x"].nbytes for b in batches) <= BATCH_BYTES
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), x)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_arrays_are_streamed(tmp_path: Path, save: object) -> None:
    assert callable(save)
    save(tmp_path / "d.npz", x=np.ones((64, 1 << 19), np.float32))  # 128 MiB
    data = open_data(tmp_path / "d.npz", [InputSpec("x", ("N", 1 << 19), F32)])
    tracemalloc.start()
    rows = sum(len(batch["x"]) for batch in data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 64
    assert peak < 5 * BATCH_BYTES


def test_one_array_feeds_one_input_whatever_its_name(tmp_path: Path) -> None:
    x = noise(4, 3)
    np.savez(tmp_path / "a.npz", data=x)
    np.save(tmp_path / "b.npy", x)
    np.save(tmp_path / "c.npy", np.asfortranarray(x))
    np.save(tmp_path / "d.npy", x.astype(">f8"))
    for name in ("a.npz", "b.npy", "c.npy", "d.npy"):
        got = drain(open_data(str(tmp_path / name), [X]))
        assert got.dtype == F32
        np.testing.assert_array_equal(got, x)


def test_a_folder_is_read_in_sorted_order_files_being_samples_or_batches(tmp_path: Path) -> None:
    x = noise(6, 3)
    np.save(tmp_path / "b.npy", x[3])
    np.save(tmp_path / "a.npy", x[:3])
    np.savez(tmp_path / "c.npz", x=x[4:])
    (tmp_path / "readme.txt").write_text("not data")
    data = open_data(tmp_path, [X])
    assert data.count == 6
    np.testing.assert_array_equal(drain(data), x)


def test_several_inputs_stay_aligned(tmp_path: Path) -> None:
    wide = InputSpec("ids", ("N", 5000), np.dtype(np.int64))
    x, ids = noise(700, 3), np.arange(700 * 5000, dtype=np.int32).reshape(700, 5000)
    np.savez(tmp_path / "d.npz", x=x, ids=ids)
    data = open_data(tmp_path / "d.npz", [X, wide])
    assert all(len(b["x"]) == len(b["ids"]) for b in data)
    np.testing.assert_array_equal(drain(data), x)
    got = drain(data, "ids")
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, ids)
    np.savez(tmp_path / "e.npz", x=x[:3], ids=ids[:2])
    with pytest.raises(BadInput, match="differ in number of samples"):
        open_data(tmp_path / "e.npz", [X, wide])


# iterables


class Reader:
    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.at = batches, 0

    def get_next(self) -> Batch | None:
        self.at += 1
        return self.batches[self.at - 1] if self.at <= len(self.batches) else None


class Rewinding(Reader):
    def rewind(self) -> None:
        self.at = 0


@pytest.mark.parametrize(
    "wrap",
    [list, iter, Reader, Rewinding, lambda b: (s for s in b)],
    ids=["list", "iterator", "reader", "rewinding", "generator"],
)
def test_iterables_of_dicts_are_read_again_even_if_they_can_be_read_only_once(wrap: object) -> None:
    x = noise(7, 3)
    assert callable(wrap)
    data = open_data(wrap([{"x": x[:4]}, {"x": x[4]}, {"x": x[5:]}]), [X])
    assert data.origin == "iterable"
    for _ in range(2):
        np.testing.assert_array_equal(drain(data), x)
    assert data.count == 7


def test_an_endless_generator_is_cut_at_the_samples_asked_for() -> None:
    def forever() -> Iterator[Batch]:
        while True:
            yield {"x": np.float32([1, 2, 3])}

    assert len(drain(open_data(forever(), [X], samples=9))) == 9


def test_a_dict_of_arrays_is_one_batch() -> None:
    x = noise(600, 3)
    np.testing.assert_array_equal(drain(open_data({"x": x}, [X])), x)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_digest_depends_on_the_values_only(sizes: list[int], seed: int) -> None:
    x = noise(sum(sizes), 3, seed=seed)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    whole = open_data({"x": x}, [X]).digest
    assert open_data([{"x": p} for p in parts], [X]).digest == whole
    assert open_data(({"x": p.astype(np.float64)} for p in parts), [X]).digest == whole
    changed = x.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    assert open_data({"x": changed}, [X]).digest != whole
    other = InputSpec("z", X.shape, X.dtype)
    assert open_data({"z": x}, [other]).digest != whole


# what is refused


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"X1": noise(2, 3)}, "no input 'X1'"),
        ({"xx": noise(2, 3)}, "did you mean 'x'"),
        ({}, "lacks input 'x'"),
        ({"x": noise(2, 4)}, r"shape \(2, 4\)"),
        ({"x": noise(2, 3, 1)}, r"shape \(2, 3, 1\)"),
        ({"x": np.array(["a", "b", "c"])}, "no numbers"),
        ({"x": np.zeros((1, 3), np.complex64)}, "no numbers"),
        ({"x": [[1.0], [1.0, 2.0]]}, "no array"),
        ({"x": np.full((1, 3), 1 << 25)}, "int64 values above 16777216"),
        ({"x": np.full((1, 3), 1e39)}, "sample 0 holds inf"),
    ],
)
def test_wrong_names_shapes_and_types(batch: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        open_data([batch], [X])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_sample_that_is_not_finite_is_named(bad: float, tmp_path: Path) -> None:
    x = noise(400, 3)
    x[333, 1] = bad
    np.save(tmp_path / "d.npy", x)
    with pytest.raises(BadInput, match=f"'x': sample 333 holds {bad}"):
        drain(open_data(tmp_path / "d.npy", [X]))


def test_integers_are_cast_where_nothing_is_lost() -> None:
    for kind in (np.uint8, np.int16, np.bool_, np.int64):
        given_ = np.array([[0, 1, 100]]).astype(kind)
        got = drain(open_data({"x": given_}, [X]))
        assert got.dtype == F32
        np.testing.assert_array_equal(got, given_.astype(np.float32))
    ids = InputSpec("x", ("N", 3), np.dtype(np.int8))
    assert drain(open_data({"x": np.array([[1, -128, 127]])}, [ids])).dtype == np.int8
    with pytest.raises(BadInput, match="outside int8"):
        open_data({"x": np.array([[1, -128, 128]])}, [ids])
    with pytest.raises(BadInput, match="convert them to int8"):
        open_data({"x": noise(1, 3)}, [ids])


def test_empty_data_and_no_samples_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros((0, 3), np.float32))
    for source in ([], iter(()), {"x": np.zeros((0, 3), np.float32)}, tmp_path / "d.npy"):
        with pytest.raises(BadInput, match="empty"):
            open_data(source, [X])
    with pytest.raises(BadInput, match="at least one sample"):
        open_data(None, [X], samples=0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match=r"holds no \.npy"):
        open_data(empty, [X])


@pytest.mark.parametrize("source", [3, object(), b"x.npz"])
def test_what_is_no_source_is_said_to_be_none(source: object) -> None:
    with pytest.raises(BadInput, match=r"no data source|dict of arrays"):
        open_data(source, [X])


def test_constant_inputs_are_warned_about_once_seen() -> None:
    said: list[str] = []
    data = open_data([{"x": np.ones((2, 3))}, {"x": np.ones((2, 3))}], [X], warn=said.append)
    assert said == []
    drain(data)
    assert said[0] == "input 'x' is 1 in every sample: ranges found say little"
    drain(data)
    assert len([s for s in said if "every sample" in s]) == 1
    varied: list[str] = []
    drain(open_data([{"x": np.ones((1, 3))}, {"x": np.zeros((1, 3))}], [X], warn=varied.append))
    assert not any("every sample" in s for s in varied)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("pickle-was-executed", "w"))


def test_pickles_are_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Bomb(), Bomb(), Bomb()], object)
    np.savez("d.npz", x=objects, allow_pickle=True)
    np.save("d.npy", objects, allow_pickle=True)
    Path("raw.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("d.npz", "d.npy"):
        with pytest.raises(BadInput, match="pickled"):
            open_data(name, [X])
    with pytest.raises(BadInput, match="cannot be read"):
        open_data("raw.npy", [X])
    with pytest.raises(BadInput, match="no numbers"):
        open_data([{"x": objects}], [X])
    assert not Path("pickle-was-executed").exists()


def npy(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    out = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + data


def test_damaged_files(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, x=noise(100, 3))
    np.save(tmp_path / "good.npy", noise(100, 3))
    flipped = bytearray(whole.getvalue())
    flipped[700] ^= 1
    cases = {
        "cut.npz": whole.getvalue()[:700],
        "crc.npz": bytes(flipped),
        "garbage.npz": b"PK\x03\x04 garbage",
        "nothing.npz": b"",
        "nothing.npy": b"",
        "cut.npy": (tmp_path / "good.npy").read_bytes()[:700],
        "lies.npy": npy((1 << 40, 3), b"0000"),
        "negative.npy": npy((-1, 3), b"0000"),
        "void.npy": npy((1, 3), b"0" * 24, "V8"),
        "header.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000,
        "huge_header.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b" " * 100,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=name):
            drain(open_data(tmp_path / name, [X]))
    with pytest.raises(BadInput, match="does not exist"):
        open_data(tmp_path / "absent.npz", [X])
    with pytest.raises(BadInput, match=r"not \.xyz"):
        open_data(tmp_path / "x.xyz", [X])


def test_a_decompression_bomb_is_refused_before_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros((1 << 16, 3), np.float32)
    np.savez_compressed(tmp_path / "d.npz", x=zeros)
    assert len(drain(open_data(tmp_path / "d.npz", [X]))) == len(zeros)
    monkeypatch.setattr(npz, "BOMB_BYTES", zeros.nbytes - 1)
    with pytest.raises(BadInput, match=f"unpacks from .* to {zeros.nbytes + 128} bytes"):
        open_data(tmp_path / "d.npz", [X])
    np.savez(tmp_path / "stored.npz", x=zeros)
    assert open_data(tmp_path / "stored.npz", [X]).count == len(zeros)


def test_a_member_may_not_promise_more_than_it_has(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", npy((1 << 40, 3), b"0000"))
        archive.writestr("readme.txt", "skipped")
    with pytest.raises(BadInput, match="promises"):
        open_data(tmp_path / "d.npz", [X])


# descriptions


IMAGE = InputSpec("image", ("N", 3, 4, 5), F32)
PIXELS = np.random.default_rng(1).integers(0, 256, (20, 4, 5, 3), np.uint8)


@pytest.fixture
def described(tmp_path: Path) -> Path:
    np.savez(
        tmp_path / "d.npz",
        pixels=PIXELS,
        y=np.arange(20),
        some=np.array([3, 1, 17]),
        mask=np.arange(20) % 2 == 0,
    )
    return tmp_path / "d.toml"


def test_a_description_normalises_and_moves_axes(described: Path) -> None:
    described.write_text(
        """
        file = "d.npz"
        labels = "y"
        index = "some"
        metric = "top1"
        [inputs.image]
        key = "pixels"
        layout = "nhwc"
        zero_point = 3
        scale = 0.25
        mean = [0.5, 1, 1.5]
        std = [1, 2, 4]
        """
    )
    data = open_data(described, [IMAGE])
    wanted = ((PIXELS - 3.0) * 0.25 - [0.5, 1, 1.5]) / [1, 2, 4]
    got = drain(data, "image")
    assert got.dtype == F32
    np.testing.assert_array_equal(got, wanted[[1, 3, 17]].transpose(0, 3, 1, 2))
    assert data.labels is not None
    assert data.labels.tolist() == [1, 3, 17]
    assert (data.metric, data.count) == ("top1", 3)
    first = open_data(described, [IMAGE], samples=2)
    assert first.labels is not None
    assert len(first.labels) == 2
    rows = drain(first, "image").transpose(0, 2, 3, 1)
    for label, row in zip(first.labels.tolist(), rows, strict=True):
        np.testing.assert_array_equal(
            row, ((PIXELS[label] - 3.0) * 0.25 - [0.5, 1, 1.5]) / [1, 2, 4]
        )


def test_the_layout_of_the_model_is_told_by_its_shape(described: Path) -> None:
    text = 'file = "d.npz"\nindex = "mask"\n[inputs.image]\nkey = "pixels"\nlayout = "nhwc"\n'
    described.write_text(text)
    for shape, axes in ((("N", 3, 4, 5), (0, 3, 1, 2)), ((2, 4, 5, 3), (0, 1, 2, 3))):
        data = open_data(described, [InputSpec("image", shape, F32)])
        np.testing.assert_array_equal(drain(data, "image"), PIXELS[::2].transpose(axes))
    with pytest.raises(BadInput, match="does not fit input"):
        open_data(described, [InputSpec("image", ("N", 3, 5, 4), F32)])


def test_integers_times_scale_are_what_dequantize_makes_of_them(tmp_path: Path) -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(-1, 1)
    np.save(tmp_path / "d.npy", codes)
    (tmp_path / "d.toml").write_text(
        'file = "d.npy"\n[inputs.x]\nscale = 0.5847029\nzero_point = 83\n'
    )
    got = drain(open_data(tmp_path / "d.toml", [InputSpec("x", ("N", 1), F32)]))
    wanted = (codes.astype(np.int32) - 83).astype(np.float32) * np.float32(0.5847029)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('file = "d.npz"\nlabel = "y"', "unknown key 'label'; did you mean 'labels'"),
        ('file = "d.npz"\n[inputs.imag]', "did you mean 'image'"),
        ('file = "d.npz"\n[inputs.image]\nsacle = 1', "did you mean 'scale'"),
        ('file = "d.npz"\n[inputs.image]\nlayout = "nhwcc"', "did you mean 'nhwc'"),
        ('file = "d.npz"\n[inputs.image]\nkey = "pixel"', "did you mean 'pixels'"),
        ('file = "d.npz"\n[inputs.image]\nkey = 3', "key is a string"),
        ('file = "d.npz"\n[inputs.image]\nscale = "1"', "number"),
        ('file = "d.npz"\n[inputs.image]\nscale = [1, 2, 3]', "one number"),
        ('file = "d.npz"\n[inputs.image]\nscale = nan', "number"),
        ('file = "d.npz"\n[inputs.image]\nstd = [1, 0, 1]', "cannot be 0"),
        ('file = "d.npz"\n[inputs.image]\nmean = []', "number"),
        ('file = "d.npz"\ninputs = 3', "tables"),
        ('file = "d.npz"\nlabels = "some"\n[inputs.image]\nkey = "pixels"\nlayout="nhwc"', "label"),
        ('file = "d.npz"\nindex = "y"\n[inputs.image]\nkey = "some"', "fit input"),
        ("", "key file is missing"),
        ("file = 3", "file is a string"),
        ('file = "../d.npz"', "outside"),
        ('file = "/etc/d.npz"', "outside"),
        ('file = "link.npz"', "outside"),
        ('file = "d.xyz"', r"not \.xyz"),
        ('root = "/etc"\nfile = "d.npz"', "does not exist"),
        ('root = "."\nfile = "../d.npz"', "outside"),
        ('file = "d.npz"\n[inputs.image]\nresize = 3', "resize is not for arrays"),
        ('file = "d.npz"\n[inputs.image]\nscale = 1' + "0" * 400, "number"),
        ("x = " + "[" * 5000, "cannot be read"),
        ("x = " + "1" * 5000, "cannot be read"),
        ("#" * (1 << 21), "no description"),
        ('file = "e.npz"', "does not exist"),
        ("file = ", "cannot be read"),
    ],
)
def test_bad_descriptions(described: Path, text: str, words: str) -> None:
    (described.parent / "link.npz").symlink_to("/etc/d.npz")
    described.write_text(text)
    with pytest.raises(BadInput, match=words):
        open_data(described, [IMAGE])


def test_mean_and_std_need_as_many_values_as_channels(described: Path) -> None:
    described.write_text(
        'file = "d.npz"\n[inputs.image]\nkey = "pixels"\nlayout = "nhwc"\nmean = [1, 2]'
    )
    with pytest.raises(BadInput, match="mean or std has 2 values"):
        open_data(described, [IMAGE])


def test_an_index_stays_within_the_file(described: Path) -> None:
    np.savez(described.parent / "d.npz", pixels=PIXELS, bad=np.array([20]), real=np.array([0.5]))
    for key, words in (("bad", "outside 0 to 19"), ("real", "axis of integers")):
        described.write_text(
            f'file = "d.npz"\nindex = "{key}"\n[inputs.image]\nkey = "pixels"\nlayout = "nhwc"'
        )
        with pytest.raises(BadInput, match=words):
            open_data(described, [IMAGE])


# made up


@pytest.mark.parametrize(("source", "origin"), [("random", "random"), (None, "synthetic")])
def test_made_up_data_are_marked_and_seeded(source: str | None, origin: str) -> None:
    specs = [IMAGE, X]
    data = open_data(source, specs, samples=5, seed=3)
    assert (data.origin, data.marked, data.count) == (origin, True, 5)
    for name in ("image", "x"):
        got = drain(data, name)
        assert got.dtype == F32
        again = open_data(source, specs, samples=2, seed=3)
        np.testing.assert_array_equal(drain(again, name), got[:2])
        other = drain(open_data(source, specs, samples=5, seed=4), name)
        assert not np.array_equal(other, got)
        assert not np.array_equal(got[0], got[1])


def test_synthetic_images_are_smooth_and_bounded_unlike_random_ones() -> None:
    spec = InputSpec("x", ("N", 3, 32, 32), F32)

    def neighbours(source: str | None) -> float:
        x = drain(open_data(source, [spec], samples=16)).astype(np.float64)
        return float(np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1])

    assert neighbours(None) > 0.7
    assert abs(neighbours("random")) < 0.05
    x = drain(open_data(None, [spec]))
    assert len(x) == 64
    assert 1.0 < np.abs(x).max() <= 2.5


@pytest.mark.parametrize("source", ["random", None])
def test_what_cannot_be_made_up_is_asked_for(source: str | None) -> None:
    with pytest.raises(BadInput, match="--calib"):
        open_data(source, [InputSpec("ids", ("N", 8), np.dtype(np.int64))])
    with pytest.raises(BadInput, match="--input-dim"):
        open_data(source, [InputSpec("x", ("N", "T"), F32)])
    with pytest.raises(BadInput, match="batch axis"):
        open_data(source, [InputSpec("x", (), F32)])


# the networks


@pytest.mark.zoo
def test_descriptions_of_the_zoo_data(zoo: Path, tmp_path: Path) -> None:
    about = json.loads((zoo / "mlperf-tiny-kws-dscnn" / "META.json").read_text())
    assert "(x-83)*0.5847029" in about["preprocessing"]
    for folder, name in (("data-cifar10", "cifar"), ("mlperf-tiny-kws-dscnn", "kws")):
        content = (zoo / folder / "calib.npz").read_bytes()
        (tmp_path / f"{name}.npz").write_bytes(content)
    head = 'labels = "y"\nmetric = "top1"\n'
    (tmp_path / "cifar.toml").write_text(
        f'file = "cifar.npz"\n{head}[inputs.input]\nkey = "x"\nlayout = "nhwc"\n'
        "scale = 0.00392156862745098\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n"
    )
    (tmp_path / "kws.toml").write_text(
        f'file = "kws.npz"\n{head}[inputs.input]\nkey = "x"\nlayout = "nhwc"\n'
        "scale = 0.5847029\nzero_point = 83\n"
    )
    with np.load(tmp_path / "cifar.npz") as arrays:
        x, y = arrays["x"].astype(np.float64), arrays["y"]
    data = open_data(tmp_path / "cifar.toml", [InputSpec("input", ("N", 3, 32, 32), F32)])
    wanted = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(drain(data, "input"), wanted.transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_array_equal(data.labels, y)
    with np.load(tmp_path / "kws.npz") as arrays:
        x = arrays["x"].astype(np.float64)
    data = open_data(tmp_path / "kws.toml", [InputSpec("input", ("N", 1, 49, 10), F32)])
    wanted = ((x - 83) * 0.5847029).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(drain(data, "input"), wanted, rtol=1e-6)
