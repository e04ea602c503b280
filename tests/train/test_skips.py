"""读不出的行只让一批少几条，有名字，有上限。"""

import logging

import pytest
import torch
from torch.utils.data import Dataset

from distillab.batch import Batch, FailedRow, collate_text
from distillab.errors import DistillabError
from distillab.train.skips import (
    MAX_FAILED_ROWS,
    GuardedCollate,
    GuardedRows,
    check_failed_rows,
    report_failed_rows,
)
from distillab.train.state import TrainerState


class Rows(Dataset):
    """第 i 行是 i, i+1, i+2；``unreadable`` 的读不出，``odd`` 的拼不成批。"""

    def __init__(self, count, unreadable=(), odd=()):
        self.count, self.unreadable, self.odd = count, set(unreadable), set(odd)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise KeyError("text")
        ids = torch.arange(index, index + (2 if index in self.odd else 3))
        item = {"input_ids": ids, "labels": torch.cat([ids[1:], torch.tensor([-100])])}
        return item if index not in self.odd else {"input_ids": ids}


def batch(data, *indices) -> Batch:
    rows = GuardedRows(data)
    return GuardedCollate(rows, collate_text)([rows[index] for index in indices])


def test_bad_rows_are_left_out_and_named():
    made = batch(Rows(8, unreadable=[1], odd=[3]), 0, 1, 2, 3)
    assert made.student.input_ids[:, 0].tolist() == [0, 2]
    assert made.failed == (FailedRow(1, "KeyError: 'text'"), FailedRow(3, "KeyError: 'labels'"))
    assert made.to("cpu").failed == made.failed


def test_good_rows_are_collated_as_ever():
    made = batch(Rows(8), 5, 6)
    assert torch.equal(made.labels, collate_text([Rows(8)[5], Rows(8)[6]]).labels)
    assert made.failed == ()


def test_a_batch_of_bad_rows_becomes_one_that_trains_nothing():
    made = batch(Rows(8, unreadable=[0, 4, 5]), 4, 5)
    assert len(made) == 0
    assert made.student.input_ids.tolist() == [[1, 2, 3]]
    assert len(made.failed) == 2


def test_data_without_a_good_row_is_refused():
    with pytest.raises(DistillabError, match="not one row"):
        batch(Rows(4, unreadable=range(4)), 0, 1)


def test_an_error_that_no_single_row_explains_is_not_hidden():
    def pairs_only(items):
        if len(items) > 1:
            raise ValueError("together they fail")
        return collate_text(items)

    rows = GuardedRows(Rows(4))
    with pytest.raises(ValueError, match="together"):
        GuardedCollate(rows, pairs_only)([rows[0], rows[1]])


def test_failed_rows_are_logged_by_every_process(caplog):
    with caplog.at_level(logging.ERROR):
        assert report_failed_rows([batch(Rows(8, unreadable=[1]), 0, 1)]) == 1
    assert "row 1 of the training data skipped: KeyError: 'text'" in caplog.text


def test_the_same_bad_rows_may_come_back_in_every_epoch():
    check_failed_rows(TrainerState(failed_rows=2 * MAX_FAILED_ROWS, current_epoch=1))
    with pytest.raises(DistillabError, match="stopped at step 7: 101 rows of the training data"):
        check_failed_rows(TrainerState(failed_rows=MAX_FAILED_ROWS + 1, current_step=7))
