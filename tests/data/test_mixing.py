"""几个来源混成一个流：份额、次序、恢复，与各自的验证集。"""

import itertools
import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from distillab.batch import (
    Example,
    Tokens,
    chunk_documents,
    chunk_example,
    collate_examples,
    collate_packed,
    collate_text,
)
from distillab.data.chunks import WikiDataset
from distillab.data.mixing import (
    Ingredient,
    MixedValidation,
    MixtureState,
    MixtureStream,
    next_source,
    shares,
)


class Numbers(Dataset):
    """第 i 条的第一个 token 是 ``start + i``，长短不一。"""

    def __init__(self, start, count):
        self.start, self.count = start, count
        self.fingerprint = f"{start}-{count}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        view = Tokens([self.start + index, *[1] * (1 + index % 3)], [1])
        return Example(view, view)


def same(item):
    return item


def stream(weights=(2.0, 1.0), window=6, seed=0):
    data = [Numbers(0, 7), Numbers(100, 5)]
    parts = [
        Ingredient(f"s{k}", weight, data[k], data[k], same) for k, weight in enumerate(weights)
    ]
    return MixtureStream(parts, window, seed)


def first(row):
    return row.student.ids[0]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(1, 200))
def test_every_prefix_holds_the_sources_in_their_shares(weights, count):
    wanted, drawn = shares(weights), [0] * len(weights)
    for number in range(1, count + 1):
        drawn[next_source(wanted, drawn)] += 1
        assert all(abs(wanted[k] * number - drawn[k]) < len(weights) for k in range(len(weights)))
    assert sum(drawn) == count


def test_a_step_holds_its_shares_from_short_to_long_and_a_source_is_read_whole_before_again():
    mixed = stream()
    rows = list(itertools.islice(mixed.items(mixed.begin(None)), 6 * 7))
    for step in range(7):
        window = [row for row, _ in rows[step * 6 : step * 6 + 6]]
        assert sorted(row.source for row in window) == [0] * 4 + [1] * 2
        sizes = [len(row.student.ids) for row in window]
        assert sizes == sorted(sizes)
    drawn = [first(row) for row, _ in rows if row.source == 0]
    assert len(drawn) == 28
    state = rows[-1][1]
    assert (state.epoch, state.drawn, state.tokens) == (4, [28, 14], [28, 14])
    in_turn = [first(stream_row) for stream_row in _in_turn(mixed, 28)]
    passes = [in_turn[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def _in_turn(mixed, count):
    """第一个来源的各条，按取出的先后：每步只有一条时，次序就是取出的次序。"""
    alone = MixtureStream(mixed.parts, 1, mixed.seed)
    found = (row for row in alone if row.source == 0)
    return list(itertools.islice(found, count))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_it_goes_on_from_any_step_through_json(cut):
    mixed = stream(seed=3)
    whole = list(itertools.islice(mixed.items(mixed.begin(None)), 6 * 8))
    saved = json.loads(json.dumps(asdict(whole[6 * cut - 1][1])))
    rest = stream(seed=3)
    again = list(itertools.islice(rest.items(rest.begin(saved)), 6 * (8 - cut)))
    assert [(first(row), state) for row, state in again] == [
        (first(row), state) for row, state in whole[6 * cut :]
    ]
    assert isinstance(rest.begin(saved), MixtureState)


def test_the_fingerprint_is_of_the_sources_the_weights_and_the_seed_not_of_the_step():
    assert stream().fingerprint == stream((4.0, 2.0), window=12).fingerprint
    assert stream().fingerprint != stream((1.0, 1.0)).fingerprint
    assert stream().fingerprint != stream(seed=1).fingerprint


def test_validation_is_divided_by_weight_and_knows_the_source_of_each():
    mixed = stream((3.0, 1.0))
    found = MixedValidation(mixed.parts, 4)
    assert [(first(found[i]), found.source_of(i)) for i in range(len(found))] == [
        (0, 0), (2, 0), (4, 0), (100, 1),
    ]  # fmt: skip
    assert found.names == ["s0", "s1"]
    assert len(MixedValidation(mixed.parts)) == 12
    assert len(MixedValidation(mixed.parts, 1)) == 2


def _pairs(batch):
    """训练的每个目标，与它读得到的前文。"""
    found = []
    view, length = batch.student, batch.student.input_ids.shape[1]
    for place, label in zip(view.index.tolist(), batch.labels.tolist(), strict=True):
        row, at = divmod(place, length)
        start = 0 if view.position_ids is None else at - int(view.position_ids[row, at])
        found.append((tuple(view.input_ids[row, start : at + 1].tolist()), label))
    return found


def test_a_chunk_of_text_trains_the_same_targets_among_conversations():
    ids = [[5, 6, 0, 7, 8, 9, 0, 3], [0, 4, 4, 2, 0, 0, 1, 2]]
    items = [WikiDataset.item(torch.tensor(row), [2]) for row in ids]
    collate = partial(collate_examples, pad_id=0)
    assert _pairs(collate([*map(chunk_example, items)])) == _pairs(collate_text(items))
    packed = collate_packed([chunk_documents(item, 0) for item in items], pad_id=0)
    assert _pairs(packed) == _pairs(collate_text(items, separator=0))
