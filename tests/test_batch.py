"""两个视角的不变量：同样多的行、同样的标签，padding 与 prompt 从不进入 head。"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillab.batch import (
    IGNORE_INDEX,
    Batch,
    Example,
    Tokens,
    View,
    collate_examples,
    collate_text,
)
from distillab.vocabulary import Vocabulary


def item(ids, labels):
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def test_only_positions_with_a_target_are_kept():
    batch = collate_text(
        [item([5, 6, 7], [6, 7, IGNORE_INDEX]), item([8, 9, 1], [IGNORE_INDEX, 1, -100])]
    )
    assert len(batch) == 3
    assert batch.labels.tolist() == [6, 7, 1]
    assert batch.student.index.tolist() == [0, 1, 4]
    assert batch.teacher is batch.student
    hidden = torch.arange(6.0).view(2, 3, 1)
    assert batch.student.rows(hidden).squeeze(1).tolist() == [0, 1, 4]


def test_a_batch_bound_for_a_gpu_is_pinned_and_nobody_waits(monkeypatch):
    batch, calls = collate_text([item([5, 6, 7], [6, 7, IGNORE_INDEX])]), []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, *device, **options: calls.append((*device, options)) or self
    )
    batch.to("cuda")
    assert calls == ["pinned", ("cuda", {"non_blocking": True})] * 3  # ids、index 与 labels
    calls.clear()
    batch.to("cpu")
    assert calls == [("cpu", {"non_blocking": False})] * 3


def test_targets_outside_the_shared_vocabulary_are_not_trained():
    batch = collate_text([item([1, 2, 3], [2, 30, IGNORE_INDEX])], vocabulary=Vocabulary(30))
    assert batch.labels.tolist() == [2]
    assert batch.student.index.tolist() == [0]


def test_views_with_different_numbers_of_rows_are_refused():
    student = View(torch.zeros(1, 4, dtype=torch.long), None, torch.tensor([0, 1]))
    teacher = View(torch.zeros(1, 9, dtype=torch.long), None, torch.tensor([5, 6, 7]))
    with pytest.raises(ValueError, match="2 student rows, 3 teacher rows and 2 labels"):
        Batch(student, teacher, torch.tensor([1, 2]))


def test_moving_a_batch_moves_every_tensor_and_keeps_shared_views_shared():
    mask = torch.ones(1, 4, dtype=torch.long)
    view = View(torch.zeros(1, 4, dtype=torch.long), mask, torch.tensor([0]))
    shared = Batch(view, view, torch.tensor([1])).to("meta")
    assert shared.teacher is shared.student
    tensors = (
        shared.labels,
        shared.student.input_ids,
        shared.student.attention_mask,
        shared.student.index,
    )
    assert all(tensor.is_meta for tensor in tensors)
    other = View(torch.zeros(1, 9, dtype=torch.long), None, torch.tensor([8]))
    paired = Batch(view, other, torch.tensor([1])).to("meta")
    assert paired.teacher.input_ids.shape == (1, 9)
    assert paired.teacher.input_ids.is_meta


# ---------------------------------------------------------------------- 有两个视角的数据


def test_a_data_loader_pins_every_tensor_and_accelerate_moves_them_without_waiting(monkeypatch):
    from accelerate.utils import send_to_device
    from torch.utils.data._utils.pin_memory import pin_memory  # DataLoader 的锁页线程调用的

    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    batch = collate_text([item([1, 2, 3], [2, 3, IGNORE_INDEX])])
    result = pin_memory(batch)
    assert isinstance(result, Batch)
    assert len(pinned) == 3  # 两个视角是同一个：输入、位置、标签
    assert result.labels is not batch.labels
    move = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, **k: moved.append(k["non_blocking"]) or move(t, *a, **k)
    )
    send_to_device(result, torch.device("meta"), non_blocking=True)
    assert moved == [True, True, True]


@pytest.mark.parametrize("response", [[0], [2, 1], [1, 1], [3], [-1]])
def test_response_positions_must_increase_within_the_sequence(response):
    with pytest.raises(ValueError, match=r"must increase within 1\.\.2"):
        Tokens([5, 6, 7], response)


def test_the_prompt_ends_where_the_last_response_begins():
    assert Tokens([1, 2, 3, 4, 5, 6], [1, 3, 4]).prompt == [1, 2, 3]
    assert Tokens([1, 2, 3], [1, 2]).prompt == [1]
    assert Tokens([1, 2, 3], []).prompt == [1, 2, 3]


def test_views_with_different_responses_are_no_example():
    with pytest.raises(ValueError, match="must share one response, found 1 and 1 tokens"):
        Example(Tokens([1, 2], [1]), Tokens([1, 3], [1]))


def test_examples_are_padded_each_view_on_its_own():
    examples = [
        Example(Tokens([1, 7, 8], [1, 2]), Tokens([1, 2, 3, 7, 8], [3, 4])),
        Example(Tokens([4, 5, 6, 9], [3]), Tokens([4, 9], [1])),
    ]
    batch = collate_examples(examples, pad_id=0)
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.student.input_ids.tolist() == [[1, 7, 8, 0], [4, 5, 6, 9]]
    assert batch.student.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.student.index.tolist() == [0, 1, 6]
    assert batch.teacher.input_ids.tolist() == [[1, 2, 3, 7, 8], [4, 9, 0, 0, 0]]
    assert batch.teacher.index.tolist() == [2, 3, 5]
    assert batch.examples == tuple(examples)


def test_examples_without_a_response_make_a_batch_without_rows():
    tokens = Tokens([1, 2], [])
    batch = collate_examples([Example(tokens, tokens)], pad_id=0)
    assert len(batch) == 0
    assert batch.teacher is batch.student


@st.composite
def an_example(draw):
    """任意的 prompt 与 response；response 可以分成几段、截断过，也可以没有。"""
    token = st.integers(1, 40)

    def view(response):
        ids, positions = draw(st.lists(token, min_size=1, max_size=6)), []
        for label in response:
            ids += draw(st.lists(token, max_size=2))
            positions.append(len(ids))
            ids.append(label)
        return Tokens(ids + draw(st.lists(token, max_size=2)), positions)

    response = draw(st.lists(token, max_size=6))
    student = view(response)
    teacher = view(response) if draw(st.booleans()) else student
    return Example(student, teacher)


vocabularies = st.builds(
    lambda limit, ids: Vocabulary(limit, tuple(sorted(i for i in ids if i < limit))),
    st.integers(1, 41),
    st.sets(st.integers(0, 40), max_size=4),
)
"""词表的上限，与其间的几个空洞。"""


@settings(deadline=None, max_examples=200)
@given(
    examples=st.lists(an_example(), min_size=1, max_size=5),
    vocabulary=st.none() | vocabularies,
)
def test_each_row_of_both_views_predicts_its_label(examples, vocabulary):
    batch = collate_examples(examples, 0, vocabulary)
    expected = [
        label
        for example in examples
        for label in example.student.labels
        if vocabulary is None or label in vocabulary
    ]
    assert batch.labels.tolist() == expected
    same = all(example.teacher is example.student for example in examples)
    assert (batch.teacher is batch.student) == same
    for view, sequences in (
        (batch.student, [example.student for example in examples]),
        (batch.teacher, [example.teacher for example in examples]),
    ):
        assert len(view.index) == len(batch)
        rows, length = view.input_ids.shape
        assert (rows, length) == (len(examples), max(len(tokens.ids) for tokens in sequences))
        mask = (
            torch.ones_like(view.input_ids) if view.attention_mask is None else view.attention_mask
        )
        assert mask.sum(1).tolist() == [len(tokens.ids) for tokens in sequences]
        kept = [
            row[wanted.bool()].tolist() for row, wanted in zip(view.input_ids, mask, strict=True)
        ]
        assert kept == [tokens.ids for tokens in sequences]
        assert not view.input_ids[mask == 0].any()
        # 不仅下一个位置是标签，而且预测它的位置与它在同一行、都不是 padding
        assert torch.equal(view.input_ids.flatten()[view.index + 1], batch.labels)
        assert ((view.index + 1) % length != 0).all()
        assert mask.flatten()[view.index].all()
        assert mask.flatten()[view.index + 1].all()
        assert torch.equal(view.index, view.index.sort().values)
