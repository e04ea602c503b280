"""两个视角的不变量：同样多的行、同样的标签，padding 与 prompt 从不进入 head。"""

import pytest
import torch

from distillab.batch import IGNORE_INDEX, Batch, View, collate_text


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


def test_targets_outside_the_shared_vocabulary_are_not_trained():
    batch = collate_text([item([1, 2, 3], [2, 30, IGNORE_INDEX])], vocab_limit=30)
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
