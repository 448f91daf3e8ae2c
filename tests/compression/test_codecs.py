"""Codecs: what is sent and what is left is what was owed, and the bytes are as they are documented."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorkv import compression
from tensorkv.compression import codec as interface
from tensorkv.compression import halves, int8, one_bit, two_bits
from tensorkv.compression.int8 import BLOCK
from tensorkv.errors import ArgumentError, NonFiniteError

F32 = np.float32
ALL = [
    {"type": "2bit", "threshold": 0.5},
    {"type": "1bit", "threshold": 0.125},
    {"type": "fp16"},
    {"type": "bf16"},
    {"type": "int8"},
    {"type": "topk", "ratio": 0.1},
    {"type": "powersgd", "rank": 2},
]
SHAPES = [(), (0,), (1,), (3, 0), (5,), (33,), (64, 3), (7, 11, 2), (3000,)]
each_codec = pytest.mark.parametrize("params", ALL, ids=[each["type"] for each in ALL])


def is_owed(*arrays):
    try:
        interface.add_residual(*arrays)
    except NonFiniteError:
        return False
    return True


def sent(codec, owed, memory=None, residual=None):
    """Encode an array; return the words, what they stand for, and what is left."""
    words = np.full(codec.nbytes(owed.shape), 0xAA, np.uint8)
    left, decoded = owed.copy(), np.full(owed.shape, np.nan, F32)
    codec.encode(owed, residual, left, words, {} if memory is None else memory)
    codec.decode(words, decoded)
    return words, decoded, left


@each_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_sent_and_what_is_left_are_what_was_owed(params, shape):
    codec = compression.parse(params)
    owed = np.random.default_rng(1).normal(size=shape).astype(F32)
    _, decoded, left = sent(codec, owed)
    np.testing.assert_allclose(decoded.astype(np.float64) + left, owed, atol=3e-6)


@each_codec
def test_words_of_the_documented_size(params):
    most = {"2bit": 1 / 12, "1bit": 1 / 24, "int8": 1 / 3.5, "fp16": 1 / 1.9, "bf16": 1 / 1.9, "topk": 0.201}
    codec = compression.parse(params)
    share = codec.nbytes((300, 1000)) / (4 * 300_000)
    assert share <= most.get(params["type"], 0.01)


@pytest.mark.parametrize("params", [ALL[0], ALL[1], ALL[5]], ids=["2bit", "1bit", "topk"])
def test_nothing_is_lost_in_a_thousand_pushes(params):
    """Multiples of 2**-10 whose sums are below 2**13 are exact in float32."""
    codec, rng = compression.parse(params), np.random.default_rng(2)
    residual, given, taken, memory = np.zeros(257, F32), np.zeros(257), np.zeros(257), {}
    for _ in range(1000):
        gradient = (rng.integers(-1024, 1025, 257) / 1024).astype(F32)
        _, decoded, residual = sent(codec, gradient + residual, memory)
        given += gradient
        taken += decoded
        assert (given == taken + residual).all()


@pytest.mark.parametrize("params", [ALL[2], ALL[3], ALL[4], ALL[6]], ids=["fp16", "bf16", "int8", "powersgd"])
def test_what_rounding_loses_in_a_thousand_pushes_is_within_the_bound(params):
    """Each push rounds the sum with the residual, and the residual, by half a unit in the last place of float32."""
    codec, rng = compression.parse(params), np.random.default_rng(3)
    shape = (40, 30)
    residual, given, taken, bound, memory = np.zeros(shape, F32), 0.0, 0.0, 0.0, {}
    for _ in range(1000):
        gradient = rng.normal(size=shape).astype(F32)
        owed = gradient + residual
        _, decoded, residual = sent(codec, owed, memory)
        given, taken = given + gradient.astype(np.float64), taken + decoded.astype(np.float64)
        bound += np.finfo(F32).eps / 2 * (np.abs(owed) + np.abs(decoded) + np.abs(residual))
        assert (np.abs(given - taken - residual) <= bound).all()


@each_codec
def test_the_same_bits_without_the_compiled_part(params, monkeypatch):
    if two_bits._codecs is None:
        pytest.skip("the compiled part is not there")
    codec, rng = compression.parse(params), np.random.default_rng(4)
    special = np.array([0.0, -0.0, 0.5, -0.5, 0.125, np.nextafter(F32(0.5), F32(0)), 1e-45, -1e-45, 3e38, -3e38], F32)
    # Around the largest and the smallest numbers of 16 bits, and halfway between two of them.
    narrow = np.array([65504, 65519.9, -65520, 7e4, 6.1e-5, 6e-8, 3e-8, -2.9e-8, 1 + 2**-11, 1 + 2**-8, 3.395e38], F32)
    for count in [*range(70), 127, 1000, 1024, 1025, 3000]:
        owed = np.concatenate([special, rng.normal(size=count).astype(F32)])[-count or len(special) + 1 :]
        if count % 3 == 0:
            owed = np.concatenate([owed, narrow, rng.normal(scale=1e-40, size=count).astype(F32)])
        residual = rng.normal(size=len(owed)).astype(F32) if count % 2 else None
        compiled = sent(codec, owed, residual=residual)
        with monkeypatch.context() as patch:
            for module in (two_bits, one_bit, halves, int8, interface):
                patch.setattr(module, "_codecs", None)
            plain = sent(codec, owed, residual=residual)
        assert [each.tobytes() for each in compiled] == [each.tobytes() for each in plain]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_all_words_of_sixteen_bits_are_read_as_torch_reads_them(name):
    words = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, F32)
    codec = compression.parse({"type": name})
    codec.decode(words.view(np.uint8), out)
    right = torch.from_numpy(words.view(np.int16)).view(codec.dtype).float().numpy()
    assert np.array_equal(out, right, equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(right))


def test_a_sum_and_whether_it_is_finite_without_the_compiled_part(monkeypatch):
    rng = np.random.default_rng(5)
    for odd in [0.0, np.nan, np.inf, -np.inf]:
        for residual in [None, rng.normal(size=100).astype(F32)]:
            gradient = rng.normal(size=100).astype(F32)
            gradient[37] = odd
            found = []
            for _ in range(2):
                out = np.empty(100, F32)
                found.append((is_owed(gradient, residual, out), out.tobytes()))
                monkeypatch.setattr(interface, "_codecs", None)
            monkeypatch.undo()
            assert found[0] == found[1]
            assert found[0][0] is bool(np.isfinite(odd))


def test_two_bits_are_the_words_of_mxnet():
    """Gradients pushed by MXNet 1.9.1 with ``dist_sync``, and the words that it then sent, taken from the network."""
    golden = json.loads((Path(__file__).parent / "mxnet_2bit.json").read_text())
    assert len(golden) == 100
    for case in golden:
        codec = compression.parse({"type": "2bit", "threshold": case["threshold"]})
        left = np.frombuffer(bytes.fromhex(case["owed"]), F32).copy()
        words = np.empty(codec.nbytes(left.shape), np.uint8)
        codec.encode(left, None, np.empty_like(left), words, {})
        assert words.tobytes().hex() == case["words"]


def test_one_bit_fills_bytes_from_the_top():
    words, decoded, left = sent(compression.parse({"type": "1bit"}), np.array([1, -1, 0, 0.5] + [-1] * 29, F32))
    assert words.tolist() == [0b10010000, 0, 0, 0, 0, 0, 0, 0]
    assert decoded[:5].tolist() == [1, -1, -1, 1, -1]
    assert left[:5].tolist() == [0, 0, 1, -0.5, 0]


def test_topk_sends_the_first_of_equal_ones_and_keeps_the_rest():
    words, decoded, left = sent(compression.parse({"type": "topk", "ratio": 0.5}), np.array([1, -1, 3, 1], F32))
    assert decoded.tolist() == [1, 0, 3, 0]
    assert left.tolist() == [0, -1, 0, 1]
    assert words.view(np.int32)[:2].tolist() == [0, 2]


def test_numbers_beyond_float16_are_sent_in_several_pushes():
    codec = compression.parse({"type": "fp16"})
    left, total = np.array([100_000, -100_000, 1e-8], F32), 0
    for _ in range(2):
        _, decoded, left = sent(codec, left)
        total += decoded
    assert total[:2].tolist() == [100_000, -100_000]
    assert left.tolist() == [0, 0, F32(1e-8)]


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 127.0, 3e38])
def test_int8_has_a_scale_for_each_block(largest):
    codec = compression.parse({"type": "int8"})
    owed = np.zeros(BLOCK + 1, F32)
    owed[3], owed[BLOCK] = largest, -1
    words, decoded, left = sent(codec, owed)
    assert words[:8].view(F32).tolist() == [F32(largest) / F32(127), F32(1) / F32(127)]
    assert decoded[BLOCK] == -1
    assert (decoded + left == owed).all()


def test_a_matrix_of_low_rank_is_sent_whole_after_a_few_pushes():
    codec, rng, memory = compression.parse({"type": "powersgd", "rank": 3}), np.random.default_rng(6), {}
    matrix = (rng.normal(size=(60, 3)) @ rng.normal(size=(3, 50))).astype(F32)
    residual = np.zeros_like(matrix)
    for _ in range(4):
        _, _, residual = sent(codec, matrix + residual, memory)
    assert np.abs(residual).max() < 1e-3
    assert memory["basis"].shape == (50, 3)


@each_codec
def test_words_that_nobody_has_encoded_do_no_harm(params):
    codec, rng = compression.parse(params), np.random.default_rng(7)
    for _ in range(50):
        out = np.empty((30, 20), F32)
        with np.errstate(all="ignore"):
            codec.decode(rng.integers(0, 256, codec.nbytes(out.shape)).astype(np.uint8), out)


@each_codec
def test_a_codec_is_described_as_it_is_made(params):
    codec = compression.parse(params)
    assert codec.to_json() == params
    assert compression.parse(json.loads(json.dumps(codec.to_json()))) == codec


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"type": "2bit", "threshold": np.float32(0.5)}, {"type": "2bit", "threshold": 0.5}),
        ({"type": "1bit", "threshold": np.int64(1)}, {"type": "1bit", "threshold": 1}),
        ({"type": "topk", "ratio": np.float16(0.25)}, {"type": "topk", "ratio": 0.25}),
        ({"type": "powersgd", "rank": np.int32(4)}, {"type": "powersgd", "rank": 4}),
    ],
)
def test_parameters_may_be_numbers_of_numpy(params, expected):
    assert json.loads(json.dumps(compression.parse(params).to_json())) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"type": "2bit", "threshold": 0}, "2bit: threshold is 0; expected a number of float32 above 0"),
        ({"type": "2bit", "threshold": -1.0}, "threshold is -1.0"),
        ({"type": "2bit", "threshold": float("nan")}, "threshold is nan"),
        ({"type": "2bit", "threshold": float("inf")}, "threshold is inf"),
        ({"type": "2bit", "threshold": 1e39}, "threshold is 1e[+]39"),
        ({"type": "2bit", "threshold": 1e-46}, "threshold is 1e-46"),
        ({"type": "2bit", "threshold": True}, "threshold is True"),
        ({"type": "2bit", "threshold": "0.5"}, "threshold is"),
        ({"type": "2bit", "treshold": 0.5}, '2bit has no parameter .treshold. .did you mean "threshold"'),
        ({"type": "1bit", "threshold": float("-inf")}, "threshold is -inf"),
        ({"type": "topk", "ratio": 0.0}, "ratio is 0.0; expected a number of float32 above 0, at most 1"),
        ({"type": "topk", "ratio": 1.01}, "ratio is 1.01"),
        ({"type": "powersgd", "rank": 0}, "rank is 0; expected an int of at least 1"),
        ({"type": "powersgd", "rank": 1.0}, "rank is 1.0"),
        ({"type": "fp16", "scale": 2}, "fp16 has no parameter 'scale'; it has none"),
        ({"type": "2bits"}, 'no codec .2bits. .did you mean "2bit"'),
        ({"type": 2}, "no codec 2"),
        ({"threshold": 0.5}, "expected a dict such as"),
        ("2bit", "expected a dict such as"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ArgumentError, match=message):
        compression.parse(params)


def test_no_codec():
    assert compression.parse(None) is None
    assert compression.parse({"type": "none"}) is None


@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [("2bit", two_bits.TwoBit, "already"), ("", two_bits.TwoBit, "non-empty"), ("mine", 3, "expected a class")],
)
def test_a_codec_that_cannot_be_registered(name, factory, message):
    with pytest.raises(ArgumentError, match=message):
        compression.register(name, factory)
