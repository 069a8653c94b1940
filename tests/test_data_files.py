"""ONNX test data, raw numbers, lists, tables and audio; other writers of the same formats say what is expected."""

from __future__ import annotations

import csv
import io
import struct
import wave
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from scipy.io import wavfile

from qcompile.data import Dataset, InputSpec, open_data
from qcompile.errors import BadInput

F32 = np.dtype(np.float32)
X = InputSpec("x", ("N", 3), F32)
Z = InputSpec("z", ("N", 2, 2), F32)


def drain(data: Dataset, name: str = "x") -> NDArray[np.generic]:
    return np.concatenate([batch[name] for batch in data])


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def described(folder: Path, text: str) -> Path:
    (folder / "data.toml").write_text(text)
    return folder / "data.toml"


# which samples


@settings(deadline=None, derandomize=True, max_examples=40)
@given(n=st.integers(1, 600), wanted=st.integers(1, 600), seed=st.integers(-5, 1 << 70))
def test_samples_are_drawn_by_the_seed_and_kept_in_order(
    tmp_path_factory: pytest.TempPathFactory, n: int, wanted: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.npy"
    np.save(path, np.arange(3 * n).reshape(n, 3))
    data = open_data(path, [X], samples=wanted, seed=seed)
    got = drain(data)
    assert data.count == len(got) == min(n, wanted)
    # the stream of PCG64 is fixed by its definition; the least numbers are taken
    stream = np.random.PCG64(seed % 2**128).random_raw(n).tolist()
    chosen = sorted(sorted(range(n), key=stream.__getitem__)[:wanted])
    np.testing.assert_array_equal(got, np.arange(3 * n).reshape(n, 3)[chosen])


# ONNX test data


def test_set(folder: Path, number: int, *tensors: TensorProto) -> None:
    place = folder / f"test_data_set_{number}"
    place.mkdir(parents=True)
    for i, tensor in enumerate(tensors):
        (place / f"input_{i}.pb").write_bytes(tensor.SerializeToString())
    (place / "output_0.pb").write_bytes(b"what came out is not read")


test_set.__test__ = False  # type: ignore[attr-defined]


def test_onnx_test_data_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    x, z = noise(12, 3), noise(12, 2, 2, seed=1).astype(np.float64)
    for i in range(12):
        typed = helper.make_tensor("?", TensorProto.FLOAT, [1, 3], x[i].tolist())
        test_set(tmp_path, i, typed, numpy_helper.from_array(z[i]))
    data = open_data(tmp_path, [X, Z])
    np.testing.assert_array_equal(drain(data), x)
    np.testing.assert_array_equal(drain(data, "z"), z.astype(np.float32))
    assert data.count == 12
    one = open_data(tmp_path / "test_data_set_10", [X, Z])
    np.testing.assert_array_equal(drain(one), x[10:11])
    about = {"file": tmp_path.name, "kind": "ONNX tensors", "files": 12}
    assert data.about["inputs"] == {"x": about, "z": about}
    with pytest.raises(BadInput, match="inputs 0, 1, and the model has 1: 'x'"):
        open_data(tmp_path, [X])
    (tmp_path / "test_data_set_3" / "input_0.pb").unlink()
    with pytest.raises(BadInput, match="test_data_set_3' holds tensors for inputs 1"):
        open_data(tmp_path, [X, Z])


def hostile_tensors() -> dict[str, tuple[bytes, str]]:
    good = numpy_helper.from_array(noise(1, 3))
    lies, far, outside = TensorProto(), TensorProto(), TensorProto()
    for tensor in (lies, far, outside):
        tensor.CopyFrom(good)
    lies.dims[0] = 1 << 40
    far.dims[:] = [1, 4]
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    text = helper.make_tensor("x", TensorProto.STRING, [1, 3], [b"a", b"b", b"c"])
    flat = numpy_helper.from_array(np.float32(3))
    sequence = onnx.SequenceProto(elem_type=1, tensor_values=[good])
    return {
        "cut": (good.SerializeToString()[:-5], "no tensor"),
        "nothing": (b"", "no TensorProto"),
        "garbage": (b"\xff" * 99, "no tensor"),
        "lies": (lies.SerializeToString(), "no tensor"),
        "far": (far.SerializeToString(), "no tensor"),
        "outside": (outside.SerializeToString(), "another file"),
        "text": (text.SerializeToString(), "numbers are read"),
        "flat": (flat.SerializeToString(), "2 axes"),
        "sequence": (sequence.SerializeToString(), "input_0.pb"),
    }


@pytest.mark.parametrize("name", hostile_tensors())
def test_tensors_that_are_none(tmp_path: Path, name: str) -> None:
    content, words = hostile_tensors()[name]
    (tmp_path / "input_0.pb").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        open_data(tmp_path, [X])


# raw numbers and lists


def test_raw_numbers_are_little_endian_samples_of_the_models_shape(tmp_path: Path) -> None:
    x = noise(5, 3)
    for i, part in enumerate(np.split(x, [1, 3])):
        (tmp_path / f"{i}.raw").write_bytes(struct.pack(f"<{part.size}f", *part.ravel().tolist()))
    np.testing.assert_array_equal(drain(open_data(tmp_path, [X])), x)
    np.testing.assert_array_equal(drain(open_data(tmp_path / "1.raw", [X])), x[1:3])
    codes = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (4, 5, 6, 3))
    (tmp_path / "codes.bin").write_bytes(struct.pack(f"<{codes.size}h", *codes.ravel().tolist()))
    text = 'file = "codes.bin"\n[inputs.x]\ndtype = "int16"\nshape = [5, 6, 3]\nlayout = "nhwc"\nscale = 0.5'
    got = drain(open_data(described(tmp_path, text), [InputSpec("x", (1, 3, 5, 6), F32)]))
    np.testing.assert_array_equal(got, codes.transpose(0, 3, 1, 2) * 0.5)
    with pytest.raises(
        BadInput, match=r"codes.bin' has 720 bytes, and a sample of float32\[7\] has 28"
    ):
        open_data(tmp_path / "codes.bin", [InputSpec("x", (1, 7), F32)])
    with pytest.raises(BadInput, match="state shape under"):
        open_data(tmp_path / "codes.bin", [InputSpec("x", (1, None), F32)])
    (tmp_path / "codes.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="has 0 bytes"):
        open_data(tmp_path / "codes.bin", [X])


def test_lists_name_files_for_one_input_or_several(tmp_path: Path) -> None:
    x, z = noise(4, 3), noise(4, 2, 2, seed=1)
    (tmp_path / "deep folder").mkdir()
    for i in range(4):
        x[i].tofile(tmp_path / "deep folder" / f"x{i}.raw")
        z[i].tofile(tmp_path / f"z{i}.raw")
    order = [2, 0, 3, 2]
    one = tmp_path / "one.txt"
    one.write_text("%comment\n#another\n" + "".join(f"deep folder/x{i}.raw\n\n" for i in order))
    np.testing.assert_array_equal(drain(open_data(one, [X])), x[order])
    one.write_text("".join(f"x:={tmp_path}/z{i}.raw\n" for i in order))
    four = InputSpec("x", ("N", 4), F32)
    np.testing.assert_array_equal(drain(open_data(one, [four])), z[order].reshape(4, 4))
    (tmp_path / "deep folder").rename(tmp_path / "deep")
    for lines in ("z:=z{0}.raw x:=deep/x{0}.raw\n", "deep/x{0}.raw  z{0}.raw\r\n"):
        one.write_text("".join(lines.format(i) for i in order))
        data = open_data(one, [X, Z])
        np.testing.assert_array_equal(drain(data), x[order])
        np.testing.assert_array_equal(drain(data, "z"), z[order])
    np.save(tmp_path / "deep" / "more.npy", x[:2])
    one.write_text("deep/more.npy\n./deep/../deep/more.npy\n")
    np.testing.assert_array_equal(drain(open_data(one, [X])), np.concatenate([x[:2], x[:2]]))


def test_lists_lead_nowhere_else_unless_that_is_stated(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    noise(1, 3).tofile(tmp_path / "secret.raw")
    noise(1, 3).tofile(inside / "x.raw")
    (inside / "link.raw").symlink_to(tmp_path / "secret.raw")
    for line in ("../secret.raw", str(tmp_path / "secret.raw"), "link.raw", "./../secret.raw"):
        (inside / "list.txt").write_text(f"x.raw\n{line}\n")
        for path in (inside / "list.txt", described(inside, 'file = "list.txt"')):
            with pytest.raises(
                BadInput, match=r"lies outside the folder.*state another folder with"
            ):
                open_data(path, [X])
    np.save(tmp_path / "secret.npy", noise(1, 3))
    (inside / "folder").mkdir()
    (inside / "folder" / "link.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(BadInput, match=r"'link.npy' lies outside the folder"):
        open_data(described(inside, 'file = "folder"'), [X])
    # whoever names a folder by itself means what is in it
    assert open_data(inside / "folder", [X]).count == 1
    stated = described(inside, f'root = "{tmp_path}"\nfile = "inside/list.txt"')
    (inside / "list.txt").write_text("inside/link.raw\nsecret.raw\n")
    np.testing.assert_array_equal(drain(open_data(stated, [X])), np.repeat(noise(1, 3), 2, 0))
    described(inside, 'root = ".."\nfile = "secret.raw"')
    assert open_data(stated, [X]).count == 1


def test_lists_that_are_wrong(tmp_path: Path) -> None:
    noise(1, 3).tofile(tmp_path / "x.raw")
    np.save(tmp_path / "x.npy", noise(1, 3))
    for name in ("absent.toml", "absent.txt", "absent.wav", "x" * 5000 + ".npy", "a\0b.csv"):
        with pytest.raises(BadInput, match="does not exist"):
            open_data(tmp_path / name, [X])
    for content, words in (
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"y.raw", "y.raw' does not exist"),
        (b"x.raw\nx.npy", "arrays and raw numbers: give one kind"),
        (b"y:=x.raw", "no input 'y'"),
        (b"x:=x.raw z:=x.raw", "no input 'z'"),
        (b"a\0b.raw", "no path|does not exist"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"x" * 5000 + b".raw", "no path|does not exist|cannot"),
        (b"x.exe", r"not \.exe"),
        (b"list.txt", r"not \.txt"),
        (b".", "not this"),
    ):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(BadInput, match=words):
            open_data(tmp_path / "list.txt", [X])
    (tmp_path / "list.txt").write_text("x.raw x.raw x.raw")
    with pytest.raises(BadInput, match="has 3 paths, and there are 2 inputs: 'x', 'z'"):
        open_data(tmp_path / "list.txt", [X, Z])


def test_inputs_may_come_from_files_of_their_own(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 2), np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "x.csv").write_text("1,2,3\n4,5,6\n7,8,9\n")
    path = described(tmp_path, '[inputs.x]\nfile = "x.csv"\n[inputs.z]\nfile = "images"')
    data = open_data(path, [X, Z], samples=2, seed=1)
    rows = (drain(data)[:, 0] - 1) / 3
    np.testing.assert_array_equal(drain(data, "z"), pixels[rows.astype(int)])
    (tmp_path / "x.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(BadInput, match=r"differ in number of samples: \{'x': 2, 'z': 3\}"):
        open_data(path, [X, Z])
    described(tmp_path, '[inputs.x]\nfile = "x.csv"')
    with pytest.raises(BadInput, match="key file is missing"):
        open_data(path, [X, Z])
    with pytest.raises(BadInput, match="holds tables for one: give each a file"):
        open_data(tmp_path / "x.csv", [X, Z])


def test_files_of_a_folder_have_to_agree_for_every_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=noise(2, 3), z=noise(1, 2, 2))
    np.savez(tmp_path / "b.npz", x=noise(1, 3), z=noise(2, 2, 2))
    with pytest.raises(BadInput, match="differ in number of samples"):
        open_data(tmp_path, [X, Z])
    open_shape = InputSpec("x", ("N", None), F32)
    np.save(tmp_path / "c.npy", noise(1, 4))
    (tmp_path / "b.npz").unlink()
    with pytest.raises(BadInput, match=r"c.npy' holds samples of shape \(4,\), and .*a.npz"):
        open_data(tmp_path, [open_shape])


# tables


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    values=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9
    ),
    header=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    kind=st.sampled_from([".csv", ".tsv"]),
    mark=st.booleans(),
)
def test_rows_of_a_table_are_samples(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[list[float]],
    header: bool,
    quoting: int,
    kind: str,
    mark: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"table{kind}"
    with path.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t", quoting=quoting)  # type: ignore[arg-type]
        if header:
            writer.writerow(["a", "b, é", "c"])
        writer.writerows(values)
    np.testing.assert_array_equal(drain(open_data(path, [X])), np.array(values, np.float32))


def test_columns_are_chosen_by_name_or_number_and_labels_left_out(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,a,b,kind,c\nx1,1,2,0,3\nx2,4,5,7,6\n")
    head = 'file = "t.csv"\nlabels = "kind"\nmetric = "top1"\n[inputs.x]\n'
    for columns in ('["a", "b", "c"]', "[1, 2, 4]", '["a", 2, "c"]'):
        data = open_data(described(tmp_path, f"{head}columns = {columns}\nmean = [1, 2, 3]"), [X])
        np.testing.assert_array_equal(drain(data), [[0, 0, 0], [3, 3, 3]])
        assert data.labels is not None
        assert data.labels.tolist() == [0, 7]
    table.write_text("a,b,kind,c\n1,2,0,3\n4,5,7,6\n")
    np.testing.assert_array_equal(
        drain(open_data(described(tmp_path, head), [X])), [[1, 2, 3], [4, 5, 6]]
    )
    square = InputSpec("x", (1, 1, 3, 1), F32)
    assert drain(open_data(described(tmp_path, head), [square])).shape == (2, 1, 3, 1)
    for text, words in (
        (f'{head}columns = ["a", "b", "k"]', "no column 'k'"),
        (f'{head}columns = ["a", "b", "kinds"]', "did you mean 'kind'"),
        (f"{head}columns = [0, 1, 9]", "no column 9"),
        (f"{head}columns = [0, 1, -1]", "names or numbers"),
        (f"{head}columns = []", "names or numbers"),
        (f"{head}columns = [true]", "names or numbers"),
        (f"{head}hop = 3", "state window as well"),
        ('file = "t.csv"\nlabels = "a"', "t.csv.*fit input|whole"),
        ('file = "t.csv"', "does not fit input"),
    ):
        if "labels = " in text and "[inputs" not in text:
            table.write_text("a,b,kind,c\n1.5,2,0,3\n")
        with pytest.raises(BadInput, match=words):
            open_data(described(tmp_path, text), [X])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n\n\n", "empty"),
        (b"a,b,c\n", "no row of numbers below a, b, c"),
        (b"1,2,3\n4,5\n", "cannot be read as a table"),
        (b"1,2,3\n4,five,6\n", "five"),
        (b"1,2,3\n4,,6\n", "row 1, column 2"),
        (b"1;2;3\n", "below 1;2;3; columns are separated by commas"),
        (b"1,2,3\n4,nan,6\n", "sample 1 holds nan"),
        (b"1,2,3\n4,1e39,6\n", "sample 1 holds inf"),
        (b"\xff\xfe1,2,3\n", "cannot be read as a table"),
        (b'"1,2,3\n' * 9, "t.csv"),
        (b"1," * 200_000, "t.csv"),
        (b"1" * 200_000, "t.csv"),
        (b"1,2,3\0\n", "t.csv"),
        (b"a,a,c\n1,2,3", "several columns 'a'"),
    ],
    ids=range(15),
)
def test_tables_that_are_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    path = tmp_path / "t.csv"
    if content.startswith(b"a,a"):
        path = described(tmp_path, 'file = "t.csv"\n[inputs.x]\ncolumns = ["a", "c", 1]')
    with pytest.raises(BadInput, match=words):
        drain(open_data(path, [X]))


def test_columns_without_a_header_are_named_by_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,2,0,3\n4,5,7,6\n")
    data = open_data(described(tmp_path, 'file = "t.csv"\nlabels = "2"'), [X])
    np.testing.assert_array_equal(drain(data), [[1, 2, 3], [4, 5, 6]])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 7]
    with pytest.raises(BadInput, match="no column '4'; it has '0', '1', '2', '3'"):
        open_data(described(tmp_path, 'file = "t.csv"\nindex = "4"\nlabels = "2"'), [X])


def test_rows_of_a_table_may_be_steps_in_time(tmp_path: Path) -> None:
    steps = np.arange(30).reshape(10, 3)
    np.savetxt(tmp_path / "t.csv", steps, "%d", ",")
    text = 'file = "t.csv"\n[inputs.x]\nwindow = 4\nhop = 3\n'
    wanted = np.stack([steps[s : s + 4] for s in (0, 3, 6)])
    channels_last = drain(open_data(described(tmp_path, text), [InputSpec("x", (1, 4, 3), F32)]))
    np.testing.assert_array_equal(channels_last, wanted)
    first = drain(open_data(described(tmp_path, text), [InputSpec("x", (1, 3, 4), F32)]))
    np.testing.assert_array_equal(first, wanted.transpose(0, 2, 1))


# audio


def write_wav(path: Path, codes: NDArray[np.int64], width: int, rate: int = 16000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(codes.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        low = (codes + (128 if width == 1 else 0)).ravel().tolist()
        file.writeframes(b"".join(int(c).to_bytes(width, "little", signed=width > 1) for c in low))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    width=st.integers(1, 4),
    channels=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    window=st.integers(1, 20),
    hop=st.integers(1, 25),
    pad=st.booleans(),
    mono=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_of_pcm_of_every_width(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    channels: int,
    lengths: list[int],
    window: int,
    hop: int,
    pad: bool,
    mono: bool,
    seed: int,
) -> None:
    assume(window != channels)  # otherwise nothing tells the axes apart, and channels come first
    folder = tmp_path_factory.mktemp("wav")
    (folder / "audio").mkdir()
    rng, half = np.random.default_rng(seed), 1 << (8 * width - 1)
    wanted = []
    for i, length in enumerate(lengths):
        codes = rng.integers(-half, half, (length, channels))
        codes.flat[0] = -half
        write_wav(folder / "audio" / f"{i}.wav", codes, width)
        values = codes / half
        values = values.mean(1, keepdims=True) if mono else values
        start = 0
        while start + window <= length:
            wanted.append(values[start : start + window])
            start += hop
        # another window where steps are left that no window has
        seen = start - hop + window if start else 0
        if pad and max(seen, start) < length:
            rest = values[start:]
            wanted.append(np.concatenate([rest, np.zeros((window - len(rest), rest.shape[1]))]))
    text = f'file = "audio"\n[inputs.x]\nwindow = {window}\nhop = {hop}\npad = {str(pad).lower()}\n'
    path = described(folder, text + 'channels = "mono"' * mono)
    spec = InputSpec("x", ("N", window, 1 if mono else channels), F32)
    if min(lengths) < window and not pad:
        with pytest.raises(BadInput, match=f"a window has {window}: pad = true"):
            open_data(path, [spec])
        return
    got = drain(open_data(path, [spec]))
    np.testing.assert_array_equal(got, np.stack(wanted).astype(np.float32))


def test_a_folder_of_audio_feeds_a_model_of_that_length(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (50, 1))
    write_wav(tmp_path / "a.wav", codes, 2)
    for shape in ((1, 20), (1, 20, 1), (1, 1, 20), (1, 1, 1, 20)):
        data = open_data(tmp_path, [InputSpec("x", shape, F32)])
        got = drain(data)
        assert got.shape == (2, *shape[1:])
        np.testing.assert_array_equal(got.reshape(2, 20), codes[:40].reshape(2, 20) / 32768)
    assert data.about["inputs"] == {
        "x": {
            "file": tmp_path.name,
            "kind": "audio",
            "files": 1,
            "window": 20,
            "hop": 20,
            "layout": "nwc",
            "rate": 16000,
        }
    }
    read = wavfile.read(tmp_path / "a.wav")[1]
    np.testing.assert_array_equal(got.ravel(), read[:40] / np.float32(32768))
    with pytest.raises(BadInput, match="state window"):
        open_data(tmp_path, [InputSpec("x", (1, None), F32)])
    write_wav(tmp_path / "b.wav", codes, 2, rate=8000)
    with pytest.raises(BadInput, match=r"b.wav' has 8000 samples a second and .*a.wav' 16000"):
        open_data(tmp_path, [InputSpec("x", (1, 20), F32)])
    with pytest.raises(BadInput, match=r"b.wav' has 8000 samples a second, and 44100 are stated"):
        open_data(
            described(tmp_path, 'file = "b.wav"\n[inputs.x]\nrate = 44100'),
            [InputSpec("x", (1, 20), F32)],
        )
    write_wav(tmp_path / "b.wav", codes.reshape(25, 2), 2)
    with pytest.raises(BadInput, match=r"b.wav' has 2 channels and .*a.wav' 1"):
        open_data(tmp_path, [InputSpec("x", (1, 20), F32)])
    with pytest.raises(BadInput, match='"mono", or left out'):
        open_data(
            described(tmp_path, 'file = "b.wav"\n[inputs.x]\nchannels = "rgb"'),
            [InputSpec("x", (1, 20), F32)],
        )


def hostile_audio(folder: Path) -> dict[str, bytes]:
    write_wav(folder / "good", np.zeros((50, 1), np.int64), 2)
    good = (folder / "good").read_bytes()
    (folder / "good").unlink()
    floats = io.BytesIO()
    wavfile.write(floats, 16000, np.zeros(50, np.float32))
    return {
        "cut": good[:-20],
        "header": good[:30],
        "nothing": b"",
        "garbage": b"RIFF" + b"\xff" * 99,
        "text": b"no audio",
        "floats": floats.getvalue(),
        "endless": good[:40] + b"\xff\xff\xff\xff" + good[44:],
        "no channels": good[:22] + b"\0\0" + good[24:],
        "no bits": good[:34] + b"\0\0" + good[36:],
        "many bits": good[:34] + b"\x40\0" + good[36:],
        "empty": good[:40] + b"\0\0\0\0",
    }


def test_audio_that_is_damaged_or_not_pcm(tmp_path: Path) -> None:
    spec = InputSpec("x", (1, 20), F32)
    for name, content in hostile_audio(tmp_path).items():
        (tmp_path / f"{name}.wav").write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}.wav"):
            drain(open_data(tmp_path / f"{name}.wav", [spec]))


# damage


def whole_files(folder: Path) -> dict[str, bytes]:
    write_wav(folder / "x.wav", np.arange(-20, 20).reshape(-1, 1), 2)
    np.save(folder / "x.npy", noise(9, 3))
    np.savez_compressed(folder / "x.npz", x=noise(9, 3))
    (folder / "x.csv").write_text("a,b,c\n1,2,3\n-4e3,5.5,6\n")
    (folder / "list.txt").write_text("x.npy\nx:=./x.npy\n")
    (folder / "input_0.pb").write_bytes(numpy_helper.from_array(noise(2, 3)).SerializeToString())
    described(
        folder,
        'file = "x.npy"\nindex = "i.txt"\n[inputs.x]\nscale = 0.5\nmean = [1, 2, 3]\nstd = 2\n',
    )
    (folder / "i.txt").write_text("3\n1\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_damage_anywhere_is_an_error_in_a_sentence_or_no_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damage"
    if not folder.exists():
        folder.mkdir()
        WHOLE.update(whole_files(folder))
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, 2 * len(content))) :]
    (folder / name).write_bytes(bytes(content))
    try:
        path = folder / ("data.toml" if name == "i.txt" else name)
        got = drain(open_data(path, [X]))
    except BadInput:
        return
    finally:
        (folder / name).write_bytes(WHOLE[name])
    assert got.shape[1:] == (3,)


WHOLE: dict[str, bytes] = {}
