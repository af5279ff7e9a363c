"""The codec: what goes in comes out, and what is no message is refused."""

from __future__ import annotations

import contextlib
import enum
import struct
import sys
import tracemalloc

import ml_dtypes
import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flame.errors import CodecError
from flame.sdk import codec

PREFIX = struct.Struct("<4sHHIIQ")
NUMPY = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
TORCH = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


class Kind(enum.Enum):
    WEIGHTS = 1
    ROUND = "round"


def joined(message, **more):
    frames = codec.encode(message, **more)
    data = b"".join((frames.head, *frames.buffers))
    assert len(data) == frames.nbytes
    return data


def back(message, **more):
    return codec.decode(joined(message, **more))


def section(data):
    """The safetensors part of a message."""
    length = PREFIX.unpack_from(data)[3]
    return data[-(-(PREFIX.size + length) // 8) * 8 :]


def rebuilt(data, change):
    """A message with a changed safetensors header, its lengths made to agree again."""
    magic, version, flags, length, head, _ = PREFIX.unpack_from(data)
    start = -(-(PREFIX.size + length) // 8) * 8
    (size,) = struct.unpack_from("<Q", data, start)
    header = change(data[start + 8 : start + 8 + size].rstrip())
    header += b" " * (-len(header) % 8)
    body = data[head:]
    prefix = PREFIX.pack(magic, version, flags, length, start + 8 + len(header), start + 8 + len(header) + len(body))
    return prefix + data[PREFIX.size : start] + struct.pack("<Q", len(header)) + header + body


def same(one, other):
    if isinstance(one, np.ndarray | np.generic):
        return (
            type(one) is type(other)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


arrays = st.sampled_from(NUMPY).flatmap(
    lambda kind: hnp.arrays(
        np.dtype(kind).newbyteorder("<"), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)
)
values = st.recursive(
    scalars | arrays | arrays.map(lambda a: a.reshape(-1)[0] if a.size else np.float32(1)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(st.sampled_from(["weights", "extra", "a", "b.c", "__metadata__", ""]), values, max_size=4)


@given(messages)
@settings(max_examples=150, deadline=None)
def test_what_goes_in_comes_out(message):
    assert same(message, back(message).data)


@given(messages, st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_message_is_refused_or_read_but_never_worse(message, data):
    wire = bytearray(joined(message))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        codec.decode(wire, limit=1 << 20)


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_noise_is_refused(noise):
    with pytest.raises(CodecError):
        codec.decode(noise)
    with pytest.raises(CodecError):
        codec.decode(
            PREFIX.pack(codec.MAGIC, 1, 0, len(noise), PREFIX.size + len(noise), PREFIX.size + len(noise)) + noise
        )


@given(messages, st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_a_message_that_is_cut_short_is_refused(message, cut):
    wire = joined(message)
    with pytest.raises(CodecError):
        codec.decode(wire[:-cut] if cut < len(wire) else b"")
    with pytest.raises(CodecError):
        codec.decode(wire + b"\0" * cut)


@pytest.mark.parametrize("kind", TORCH, ids=str)
def test_tensors_of_pytorch_arrive_with_their_type(kind):
    tensor = torch.arange(12).reshape(3, 4).to(kind)
    got = back({"weights": {"w": tensor, "t": tensor.t(), "s": tensor[0, 1], "e": tensor[:0]}})["weights"]
    for name, sent in (("w", tensor), ("t", tensor.t()), ("s", tensor[0, 1]), ("e", tensor[:0])):
        if kind is torch.bfloat16:
            assert got[name].dtype is kind
            assert torch.equal(got[name], sent)
        else:
            assert np.array_equal(got[name], sent.numpy())
            assert got[name].dtype == sent.numpy().dtype


def test_a_parameter_that_is_trained_is_sent_by_value():
    layer = torch.nn.Linear(3, 2)
    got = back({"weights": dict(layer.named_parameters())})["weights"]
    assert np.array_equal(got["weight"], layer.weight.detach().numpy())


def test_bfloat16_without_pytorch_is_one_of_ml_dtypes_or_an_error_that_says_what_to_do(monkeypatch):
    wire = joined({"w": np.arange(6).astype(ml_dtypes.bfloat16)})
    assert codec.decode(wire)["w"].dtype is torch.bfloat16
    monkeypatch.delitem(sys.modules, "torch")
    got = codec.decode(wire)["w"]
    assert got.dtype == ml_dtypes.bfloat16
    assert not got.flags.writeable
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CodecError, match="import torch in this role, or pip install ml_dtypes"):
        codec.decode(wire)


def test_big_endian_and_strided_arrays_are_converted():
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    strided = np.arange(24, dtype="i4").reshape(4, 6)[::2, ::3]
    got = back({"big": big, "strided": strided, "fortran": np.asfortranarray(big)})
    assert np.array_equal(got["big"], big)
    assert got["big"].dtype == "<f4"
    assert np.array_equal(got["strided"], strided)
    assert np.array_equal(got["fortran"], big)


def test_the_bytes_behind_the_envelope_are_a_safetensors_file(tmp_path):
    weights = {"fc.weight": np.arange(6, dtype="f4").reshape(2, 3), "fc.bias": np.zeros(0, "f8"), "n": np.array(7)}
    data = section(joined({"weights": weights, "extra": {"c": [np.ones(3, "u1")]}, "round": 3}))
    loaded = safetensors.numpy.load(data)
    assert loaded.keys() == {*weights, "extra.c.0"}
    for name, array in weights.items():
        assert np.array_equal(loaded[name], array)
    (tmp_path / "m.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("fc.weight"), torch.arange(6.0).reshape(2, 3))


def test_names_that_would_clash_are_kept_apart():
    message = {"weights": {"a.b": np.zeros(1), "__metadata__": np.ones(2)}, "a": {"b": np.full(3, 2.0)}}
    assert same(message, back(message).data)
    assert len(safetensors.numpy.load(section(joined(message)))) == 3


def test_every_tensor_lies_at_a_multiple_of_its_element():
    message = {"weights": {f"{kind}{n}": np.ones(n, kind) for n in (1, 3) for kind in NUMPY}}
    buffer = bytearray(joined(message))
    head = PREFIX.unpack_from(buffer)[4]
    assert head % 64 == 0
    assert same(message, codec.decode(buffer).data)
    assert all(array.flags.aligned for array in codec.decode(buffer)["weights"].values())


def test_nothing_is_copied_in_either_direction():
    array = np.zeros(1 << 16)
    frames = codec.encode({"weights": {"w": array}})
    array[7] = 5.0
    assert np.frombuffer(frames.buffers[0])[7] == 5.0
    buffer = bytearray(frames.head) + b"".join(frames.buffers)
    got = codec.decode(buffer)["weights"]["w"]
    buffer[-1] = 1
    assert got[-1] != 0
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


def test_the_envelope_says_who_and_when():
    got = back({"x": 1}, sender="t1", round=4, attempt=2, kind="update", metadata={"loss": 0.5})
    assert (got.sender, got.round, got.attempt, got.kind, got.metadata) == ("t1", 4, 2, "update", {"loss": 0.5})
    assert "t1" in repr(got)


def test_keys_may_be_members_of_an_enum():
    got = back({Kind.WEIGHTS: {"w": np.ones(2)}, Kind.ROUND: 3})
    assert Kind.WEIGHTS in got
    assert "weights" in got
    assert got[Kind.ROUND] == 3
    assert got.get(Kind.WEIGHTS) is got["weights"]
    assert dict(got).keys() == {"weights", "round"}
    with pytest.raises(CodecError, match="same on the wire"):
        codec.encode({Kind.ROUND: 1, "round": 2})


def test_a_received_message_can_be_sent_on():
    got = back({"weights": {"w": np.arange(3.0)}, "n": 1})
    assert same({"weights": {"w": np.arange(3.0)}, "n": 1}, back(got).data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(2, "c16"), "complex128"),
        (np.array(["a"]), "'x'"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (object(), "object"),
        (2**70, "cannot be sent"),
        ({1, 2}.__iter__(), "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_named(value, words):
    with pytest.raises(CodecError, match=words):
        codec.encode({"x": value})


def test_too_deep_is_refused_on_both_sides():
    deep = 1
    for _ in range(codec.DEPTH + 5):
        deep = [deep]
    with pytest.raises(CodecError, match="deep"):
        codec.encode({"x": deep})
    for nest in (b"\x91", b"\x81\xa1a"):
        wire = joined({"x": b"?" * 600})
        evil = wire.replace(b"\xc5\x02\x58" + b"?" * 600, (nest * 700)[:600] + b"\xc0\xc0\xc0")
        with pytest.raises(CodecError):
            codec.decode(evil)


def test_a_list_that_claims_billions_of_items_is_not_made():
    wire = joined({"x": b"?" * 5})
    for evil in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff\xc0\xc0"):
        tracemalloc.start()
        with pytest.raises(CodecError):
            codec.decode(wire.replace(b"\xc4\x05?????", evil + b"\xc0\xc0"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_other_versions_are_refused_with_both_numbers():
    wire = bytearray(joined({"x": 1}))
    for version in (0, 2, 65535):
        struct.pack_into("<H", wire, 4, version)
        with pytest.raises(CodecError, match=f"version {version}, this worker reads version 1"):
            codec.decode(wire)


def test_a_message_beyond_the_limit_is_refused():
    wire = joined({"x": np.zeros(1000)})
    with pytest.raises(CodecError, match="at most 1000"):
        codec.decode(wire, limit=1000)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.replace(b"[0,8]", b"[0,16]"),  # overlaps the next
        lambda h: h.replace(b"[8,16]", b"[0,8]"),  # two at one place
        lambda h: h.replace(b"[8,16]", b"[16,24]"),  # a hole
        lambda h: h.replace(b"[8,16]", b"[8,18446744073709551616]"),
        lambda h: h.replace(b"[8,16]", b"[16,8]"),
        lambda h: h.replace(b"[0,8]", b"[-8,0]"),
        lambda h: h.replace(b'"shape":[1]', b'"shape":[1000000000000]', 1),
        lambda h: h.replace(b'"shape":[1]', b'"shape":[-1,-1]', 1),
        lambda h: h.replace(b'"shape":[1]', b'"shape":[4611686018427387904,4]', 1),
        lambda h: h.replace(b"F64", b"F32", 1),
        lambda h: h.replace(b"F64", b"F99", 1),
        lambda h: h.replace(b'"b"', b'"a"'),  # a name twice
        lambda h: h.replace(b'"b"', b'"__metadata__"'),
        lambda h: b"{}",
        lambda h: b"[]",
        lambda h: b"[" * 5000,
        lambda h: h[:-5],
        lambda h: b"\xff" * len(h),
    ],
)
def test_tensors_that_do_not_lie_where_they_should_are_refused(change):
    wire = joined({"a": np.zeros(1), "b": np.ones(1)})
    assert same(codec.decode(rebuilt(wire, lambda h: h)).data, codec.decode(wire).data)
    with pytest.raises(CodecError):
        codec.decode(rebuilt(wire, change))


def test_a_zero_size_name_that_stands_twice_is_refused():
    wire = joined({"a": np.zeros(0), "b": np.zeros(0)})
    with pytest.raises(CodecError):
        codec.decode(rebuilt(wire, lambda h: h.replace(b'"b"', b'"a"')))


def test_references_to_tensors_that_are_not_there_are_refused():
    envelope = ["s", 0, 1, "", {}, 0, None, None]
    for data in (
        msgspec.msgpack.Ext(1, b"\0\0\0\0"),
        msgspec.msgpack.Ext(3, struct.pack("<III", 0, 2**32 - 1, 0)),
        msgspec.msgpack.Ext(9, b"x"),
        msgspec.msgpack.Ext(1, b"x"),
        [1],
    ):
        packed = msgspec.msgpack.encode([*envelope, {"x": data} if data != [1] else [1]])
        start = -(-(PREFIX.size + len(packed)) // 8) * 8
        tail = struct.pack("<Q", 8) + b"{}      "
        wire = PREFIX.pack(codec.MAGIC, 1, 0, len(packed), start + 16, start + 16) + packed
        with pytest.raises(CodecError):
            codec.decode(wire + b"\0" * (start - len(wire)) + tail)


def test_a_digest_betrays_damaged_tensors():
    wire = bytearray(joined({"x": np.arange(100.0)}, digest=True))
    assert codec.decode(wire)["x"][99] == 99
    wire[-3] ^= 1
    with pytest.raises(CodecError, match="damaged on its way"):
        codec.decode(wire)


def test_the_memory_is_released_once_nothing_uses_it_also_when_decoding_fails():
    released = []
    message = codec.decode(bytearray(joined({"x": np.arange(4.0)})), release=lambda: released.append(1))
    view = torch.frombuffer(message["x"][1:].copy(), dtype=torch.float64)
    part = message["x"].reshape(2, 2)[1]
    del message
    assert not released
    assert part[0] == view[1] == 2
    del part
    assert released == [1]
    with pytest.raises(CodecError):
        codec.decode(b"x" * 100, release=lambda: released.append(2))
    assert released == [1, 2]
