"""记录：读回来的与写进去的逐位相同，格式与逐位的参考相同，尾部不会在 float16 里丢掉。"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillab.teachers.records import MAX_BITS, MAX_PROBS, Layout, Records, weights

VOCABULARIES = [1, 2, 3, 255, 256, 257, 400, 65_536, 131_072, 131_073, 151_936, 1 << MAX_BITS]


def records(layout: Layout, count: int, seed: int, concentration: float = 0.1) -> Records:
    """随机的目标；熵与对数概率是任意的 32 位，NaN 与无穷也在内。"""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, layout.vocab_size, (count, layout.ids))
    ids[:1], ids[1:2] = 0, layout.vocab_size - 1
    top, probs = rng.integers(0, layout.vocab_size, count), None
    if layout.probs:
        shares = rng.dirichlet(np.full(layout.ids + 1, concentration), count)
        probs, top = -np.sort(-shares[:, 1:].astype(np.float32), 1), ids[:, 0]
    floats = rng.integers(0, 1 << 32, (2, count), np.uint32).view(np.float32)
    return Records(ids, probs, top, *floats)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


@settings(deadline=None, max_examples=150)
@given(
    vocab_size=st.sampled_from(VOCABULARIES) | st.integers(1, 1 << MAX_BITS),
    ids=st.integers(1, 70),
    probs=st.booleans(),
    count=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_what_is_read_is_what_was_written(vocab_size, ids, probs, count, seed):
    layout = Layout(vocab_size, min(ids, vocab_size), probs)
    before = records(layout, count, seed)
    rows = layout.pack(before)
    assert rows.shape == (count, layout.size)
    after = layout.unpack(rows)
    for name in ("ids", "top", "entropy", "label_log_prob"):
        assert same(getattr(after, name), getattr(before, name)), name
    assert (after.probs is None) == (not probs)
    assert same(layout.unpack(np.asfortranarray(rows)).ids, before.ids)


@pytest.mark.parametrize(("layout", "size"), [
    (Layout(151_936, 12, probs=False), 38), (Layout(131_072, 12, probs=False), 36),
    (Layout(151_936, 32, probs=False), 83), (Layout(151_936, 64, probs=False), 155),
    (Layout(151_936, 20, probs=True), 93), (Layout(151_936, 50, probs=True), 221),
    (Layout(151_936, 100, probs=True), 433),
])  # fmt: skip
def test_bytes_a_token(layout, size):
    assert layout.size == size


@pytest.mark.parametrize("probs", [False, True])
def test_the_format_is_the_plain_one_bit_by_bit(probs):
    layout = Layout(151_936, 7, probs)
    before = records(layout, 50, 0)
    expected = []
    for ids, top in zip(before.ids.tolist(), before.top.tolist(), strict=True):
        number = sum(value << (18 * at) for at, value in enumerate(ids if probs else [*ids, top]))
        expected.append(number.to_bytes(16 if probs else 18, "little"))
    rows = layout.pack(before)
    assert [row[: len(expected[0])].tobytes() for row in rows] == expected
    floats = np.stack([before.entropy, before.label_log_prob], 1)
    assert rows[:, -8:].tobytes() == floats.tobytes()
    if probs:
        stored = rows[:, 16:-8].copy().view(np.float16)
        assert (stored[:, 1:] == before.probs[:, 1:].astype(np.float16)).all()


@settings(deadline=None, max_examples=60)
@given(
    ids=st.sampled_from([1, 2, 20, 100, 1000]),
    concentration=st.sampled_from([0.003, 0.03, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
def test_probabilities_and_the_tail_keep_eleven_bits(ids, concentration, seed):
    layout = Layout(151_936, ids, probs=True)
    original = records(layout, 20, seed, concentration)
    before, after = original.probs, layout.unpack(layout.pack(original)).probs
    assert after.dtype == np.float32
    tails = [1 - probs.sum(-1, dtype=np.float64) for probs in (before, after)]
    outcomes = [
        np.concatenate([probs, tail[:, None]], 1)
        for probs, tail in zip((before, after), tails, strict=True)
    ]
    largest = outcomes[0][:, [0, -1]].max(-1, keepdims=True)
    # float16 的半个间隔；不存的那个的误差是其余的误差之和
    error = 2**-11 * outcomes[0].clip(2**-14)
    error = np.where(outcomes[0] == largest, error.sum(-1, keepdims=True), error)
    assert (np.abs(outcomes[0].clip(0) - outcomes[1]) <= error + 1e-7).all()
    assert (after >= 0).all()
    assert (tails[1] >= 0).all()
    assert (1 - after.sum(-1) == tails[1]).all()  # float32 里的尾部也没有误差


def test_a_small_tail_beside_a_sure_token_is_not_lost():
    layout = Layout(400, 2, probs=True)
    ids, zeros = np.array([[5, 7]]), np.zeros(1, np.float32)
    probs = np.array([[1 - 1.5e-4, 1e-4]], np.float32)
    after = layout.unpack(layout.pack(Records(ids, probs, ids[:, 0], zeros, zeros))).probs
    assert 1 - after.sum() == pytest.approx(5e-5, rel=2e-3)
    assert np.float16(probs[0, 0]) == 1


@pytest.mark.parametrize("probs", [[1.0, 0.0], [0.25, 0.0], [0.0, 0.0], [0.5, 0.5], [1.0000001, 0]])
def test_padding_and_ends_stay_as_they_are(probs):
    layout = Layout(400, 2, probs=True)
    ids, zeros = np.array([[5, 7]]), np.zeros(1, np.float32)
    original = np.array([probs], np.float32)
    after = layout.unpack(layout.pack(Records(ids, original, ids[:, 0], zeros, zeros))).probs
    assert after.tolist() == np.minimum(original, 1).tolist()


def test_weights_are_counts_over_k():
    ids = np.array([[3, 3, 9, 9, 9, 1], [0, 1, 2, 3, 4, 5]])
    dense = np.zeros((2, 10), np.float32)
    np.add.at(dense, (np.arange(2)[:, None], ids), weights(ids))
    assert weights(ids).dtype == np.float32
    np.testing.assert_allclose(dense[0, [1, 3, 9]], [1 / 6, 2 / 6, 3 / 6], rtol=1e-6)
    np.testing.assert_allclose(dense.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(("vocab_size", "ids", "probs"), [
    (0, 1, False), ((1 << MAX_BITS) + 1, 1, False), (400, 0, True), (400, 401, True),
    (1 << 17, MAX_PROBS + 1, True),
])  # fmt: skip
def test_layouts_that_cannot_be(vocab_size, ids, probs):
    with pytest.raises(ValueError, match="expected 1 to "):
        Layout(vocab_size, ids, probs)


def test_records_that_do_not_fit_are_refused():
    drawn, likeliest = Layout(400, 3, probs=False), Layout(400, 3, probs=True)
    good = {layout: records(layout, 4, 0) for layout in (drawn, likeliest)}
    other = np.full(4, 399)
    for layout, changed, message in [
        (drawn, {"ids": good[drawn].ids[:, :2]}, r"ids \[4, 2\], expected \[P, 3\]"),
        (drawn, {"ids": good[drawn].ids + 1}, "outside the vocabulary of 400"),
        (drawn, {"top": good[drawn].top - 400}, "outside the vocabulary of 400"),
        (drawn, {"top": good[drawn].top[:2]}, r"expected \[4\]"),
        (drawn, {"probs": good[likeliest].probs}, "probs given: True, expected False"),
        (likeliest, {"probs": None}, "probs given: False, expected True"),
        (likeliest, {"probs": good[likeliest].probs[:, :2]}, r"\[4, 2\], expected \[4, 3\]"),
        (likeliest, {"probs": good[likeliest].probs[:, ::-1]}, "must be the likeliest"),
        (likeliest, {"top": other}, "must be the likeliest, and the top"),
    ]:
        with pytest.raises(ValueError, match=message):
            layout.pack(good[layout]._replace(**changed))
    with pytest.raises(ValueError, match=r"uint8 \[4, 5\], expected uint8 \[P, "):
        drawn.unpack(np.zeros((4, 5), np.uint8))
