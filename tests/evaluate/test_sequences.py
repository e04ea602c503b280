"""要评测的序列：哪些 token 算、属于谁、是什么文字。"""

import families
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillab.batch import Example, Tokens
from distillab.data.chunks import WikiDataset
from distillab.errors import DistillabError
from distillab.evaluate.sequences import Sequences, examples_of, same_text
from distillab.models.tokenizer import document_separator
from distillab.vocabulary import Vocabulary


def example(ids, response, teacher=None):
    student = Tokens(ids, response)
    return Example(student, student if teacher is None else teacher)


@pytest.fixture
def data(tiny_tokenizer):
    return Sequences(
        "some",
        [
            example([1, 65, 66, 67], [1, 2, 3]),
            example([1, 2, 3, 4, 5, 390], [5]),
            example([70, 71], []),
            example([1, 68, 390], [1, 2], Tokens([9, 9, 9, 9, 9, 9, 9, 68, 390], [7, 8])),
        ],
        tiny_tokenizer,
        vocabulary=Vocabulary(300),
    )


def test_tokens_outside_the_shared_vocabulary_and_sequences_without_a_token_do_not_count(data):
    assert data.labels.tolist() == [65, 66, 67, 68]
    assert data.tokens.tolist() == [3, 1]
    assert data.positions.tolist() == [1, 2, 3, 1]
    assert data.privileged
    assert (data.longest("student"), data.longest("teacher")) == (4, 9)
    with pytest.raises(DistillabError, match="none: no response token"):
        Sequences("none", [example([1, 2], [])], None, Vocabulary(300))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_go_from_long_to_short_and_every_row_finds_its_place(data, size):
    labels = np.zeros(len(data.labels), dtype=int)
    widths = []
    for rows, batch in data.batches(size):
        labels[rows] = batch.labels
        widths.append(batch.teacher.input_ids.shape[1])
    assert labels.tolist() == data.labels.tolist()
    assert widths == sorted(widths, reverse=True)


def test_values_add_up_by_sequence(data):
    assert data.sums(np.array([1.0, 10.0, 100.0, 7.0])).tolist() == [111.0, 7.0]


def test_text_of_labels_holds_no_special_token_and_bytes_are_utf8(tiny_tokenizer):
    ids = tiny_tokenizer("知识蒸馏", add_special_tokens=False)["input_ids"]
    whole = [5, *ids, tiny_tokenizer.eos_token_id]
    data = Sequences(
        "x", [example(whole, list(range(1, len(whole))))], tiny_tokenizer, Vocabulary(400)
    )
    assert data.texts == ["知识蒸馏"]
    assert data.bytes.tolist() == [12]


def test_digest_follows_every_token_and_what_is_predicted(tiny_tokenizer):
    def digest(*examples):
        return Sequences("x", examples, tiny_tokenizer, Vocabulary(400)).sha256

    first = digest(example([1, 2, 3], [1, 2]))
    assert first == digest(example([1, 2, 3], [1, 2]))
    others = [
        digest(example([1, 2, 4], [1, 2])),
        digest(example([1, 2, 3], [2])),
        digest(example([1, 2, 3], [1, 2], Tokens([7, 1, 2, 3], [2, 3]))),
        digest(example([1, 2, 3], [1, 2]), example([1, 2, 3], [1, 2])),
    ]
    assert len({first, *others}) == 5


def test_chunks_are_taken_evenly_and_all_but_the_first_token_are_predicted():
    chunks = [WikiDataset.item(torch.tensor([i, 10, 11])) for i in range(6)]
    found = examples_of(chunks, 3)
    assert [one.student.ids[0] for one in found] == [0, 2, 4]
    assert all(one.student.response == [1, 2] for one in found)
    assert all(one.teacher is one.student for one in found)


def test_another_tokenizer_predicts_the_same_text_and_the_same_document_ends(tiny_tokenizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["模型 model"], trainer)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    end = tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    # 正文里字面上的 </s> 只是文字。
    one, two = (
        tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("中国的首都", "small </s> model")
    )
    ids = [*one, end, *two]
    chunks = [WikiDataset.item(torch.tensor(part)) for part in (ids, [end, *two])]
    data = Sequences("x", examples_of(chunks, None), tiny_tokenizer, Vocabulary(400))
    found = same_text(data, tiny_tokenizer, other)
    assert found.texts == data.texts
    assert found.bytes.tolist() == data.bytes.tolist()
    for position, chunk in enumerate(found.examples):
        labels = chunk.student.labels
        assert labels.count(other.eos_token_id) == (position == 0)
        assert len(labels) < len(chunk.student.ids)
    assert found.examples[1].student.ids[0] == other.eos_token_id


def test_a_separator_that_is_neither_eos_nor_pad_becomes_the_other_separator():
    tokenizer, other = (families.tokenizer_of(name) for name in ("lfm2", "qwen2.5"))
    end = document_separator(tokenizer)
    assert end not in tokenizer.all_special_ids
    one, two = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Paris is", "a city")
    )
    chunk = WikiDataset.item(torch.tensor([*one, end, *two]))
    data = Sequences("x", examples_of([chunk], None), tokenizer, Vocabulary(len(tokenizer)))
    (example,) = same_text(data, tokenizer, other).examples
    assert example.student.ids.count(document_separator(other)) == 1
