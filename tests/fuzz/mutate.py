"""Changes that keep a file readable enough to get past its outermost check: in messages, archives and text."""

from __future__ import annotations

import io
import random
import zipfile

import onnx

NUMBERS = (
    -(2**63),
    -(2**31),
    -129,
    -2,
    -1,
    0,
    1,
    2,
    3,
    7,
    127,
    2**15,
    2**31 - 1,
    2**31,
    2**40,
    2**63 - 1,
)
REALS = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-45, 1e-12, 3.4e38, -1.0, 1e300)
TEXTS = (
    "",
    "x",
    "y",
    "axis",
    "ai.onnx",
    "NOTSET",
    "SAME_UPPER",
    "../x",
    "\0",
    "é" * 300,
    "linear",
    "Relu",
)
TOKENS = (
    b"nan", b"inf", b"-1", b"0", b"1e999", b"99999999999999999999", b"[]", b"{}", b'""', b"true", b"[[pass]]",
    b"[", b"]", b"'", b"\n", b"\\u0000", b"\xff", b"null", b".", b"=", b"1979-05-27", b"-0.0", b"1e-320",
)  # fmt: skip


def message(proto: onnx.ModelProto, rng: random.Random, times: int) -> onnx.ModelProto:
    """The message with a few of its fields, at any depth, changed, doubled, swapped or gone; edited in place."""
    for _ in range(times):
        holders = list(_messages(proto))
        holder = rng.choice(holders)
        fields = [f for f, _ in holder.ListFields()]
        if rng.random() < 0.1 or not fields:
            fields = list(holder.DESCRIPTOR.fields)
        field = rng.choice(fields)
        if field.is_repeated:
            _repeated(holder, field, rng, holders)
        elif field.type == field.TYPE_MESSAGE:
            _message(getattr(holder, field.name), rng, holders)
        elif rng.random() < 0.15:
            holder.ClearField(field.name)
        else:
            setattr(holder, field.name, _value(field, getattr(holder, field.name), rng))
    return proto


def _messages(holder):
    yield holder
    for field, value in holder.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner)


def _message(value, rng: random.Random, holders) -> None:
    same = [h for h in holders if h.DESCRIPTOR is value.DESCRIPTOR and h is not value]
    if same and rng.random() < 0.7:
        other = type(value)()
        other.CopyFrom(rng.choice(same))
        value.CopyFrom(other)
    elif rng.random() < 0.5:
        value.Clear()
    else:
        value.SetInParent()


def _repeated(holder, field, rng: random.Random, holders) -> None:
    items = getattr(holder, field.name)
    at = rng.randrange(len(items)) if len(items) else 0
    choice = rng.random()
    if items and choice < 0.25:
        del items[at]
    elif field.type == field.TYPE_MESSAGE:
        same = [h for h in holders if h.DESCRIPTOR is field.message_type]
        copy = items.add()
        if same:
            other = type(copy)()
            other.CopyFrom(rng.choice(same))
            copy.CopyFrom(other)
        if len(items) > 1 and choice < 0.7:
            kept = type(copy)()
            kept.CopyFrom(items[at])
            items[at].CopyFrom(copy)
            copy.CopyFrom(kept)
    elif items and choice < 0.7:
        items[at] = _value(field, items[at], rng)
    elif items and choice < 0.85:
        items.append(rng.choice(items))
    else:
        items.append(_value(field, type(items[0])() if items else None, rng))


def _value(field, old: object, rng: random.Random):
    match field.cpp_type:
        case (
            field.CPPTYPE_INT32 | field.CPPTYPE_INT64 | field.CPPTYPE_UINT64 | field.CPPTYPE_UINT32
        ):
            number = (
                rng.choice(NUMBERS)
                if rng.random() < 0.6
                else int(old or 0) + rng.choice((-1, 1, 8))
            )
            wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
            signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
            bits = (64 if wide else 32) - signed
            return max(-(1 << bits) if signed else 0, min(number, (1 << bits) - 1))
        case field.CPPTYPE_ENUM:
            return rng.randrange(0, 25)
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return rng.choice(REALS)
        case _ if field.type == field.TYPE_BYTES:
            return damaged(old if isinstance(old, bytes) else b"", rng)
        case _:
            return rng.choice((*TEXTS, *([old] if isinstance(old, str) else [])))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed or stretched."""
    made = bytearray(data)
    match rng.randrange(4):
        case 0:
            del made[rng.randint(0, len(made)) :]
        case 1 if made:
            made[rng.randrange(len(made))] = rng.randrange(256)
        case 2:
            made += bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        case _ if len(made) >= 4:
            at = rng.randrange(len(made) // 4) * 4
            made[at : at + 4] = rng.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\1\0\0\0", b"\xff" * 4)
            )
    return bytes(made)


def text(data: bytes, rng: random.Random) -> bytes:
    """Text with a word changed for another, a line doubled or gone, a number for one that is out of range."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randint(0, len(lines)), lines[at])
        case 2:
            words = lines[at].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            lines[at] = b" ".join(words)
        case 3:
            other = rng.choice(lines).split(b"=")
            here = lines[at].split(b"=")
            here[-1] = other[-1]
            lines[at] = b"=".join(here)
        case _:
            spot = rng.randint(0, len(lines[at]))
            lines[at] = lines[at][:spot] + rng.choice(TOKENS) + lines[at][spot:]
    return b"\n".join(lines)


def archive(data: bytes, rng: random.Random) -> bytes:
    """A .npz with one of its arrays damaged, renamed or doubled, and its checksums right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(i.filename, old.read(i)) for i in old.infolist()]
    except Exception:
        return damaged(data, rng)
    if not members:
        return damaged(data, rng)
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(4):
        case 0:
            members[at] = (
                rng.choice(("x.npy", "y.npy", "", "../x.npy", "a/b.npy", "é.npy", ".npy")),
                content,
            )
        case 1:
            members.append((rng.choice(("x.npy", name)), content))
        case _:
            members[at] = (name, array(content, rng))
    made = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(made, "w", packing) as new:
        for name, content in members:
            new.writestr(zipfile.ZipInfo(name), content, packing)
    return made.getvalue()


def array(data: bytes, rng: random.Random) -> bytes:
    """A .npy whose header or values are changed."""
    if rng.random() < 0.5 or len(data) < 16:
        return damaged(data, rng)
    end = min(len(data), 10 + int.from_bytes(data[8:10], "little"))
    words = (
        b"<f4", b"<f8", b"|O", b"|S4", b"<U2", b">f4", b"<M8[s]", b"|b1", b"<i8", b"<f2", b"<c8", b"|V4",
        b"True", b"False", b"(1,)", b"()", b"(0, 3)", b"(-1,)", b"(4, 3)", b"(99999999999,)", b"(3, 2**62)", b"4",
        b"[('a','<f4')]", b"<u8", b"1.5", b"None", b"1L", b"<f16",
    )  # fmt: skip
    header = data[10:end]
    for separator in rng.sample((b"'", b" ", b","), 3):
        parts = header.split(separator)
        if len(parts) > 1:
            parts[rng.randrange(len(parts))] = rng.choice(words)
            header = separator.join(parts)
            break
    header = header[:65000]
    return data[:8] + len(header).to_bytes(2, "little") + header + data[end:]
