"""同样的文字、两种切法：按字节对齐成段，文字不同的一截对不上，数得出对得有多齐。"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)  # fmt: skip
from transformers import PreTrainedTokenizerFast

from distillab.batch import IGNORE_INDEX, Example, Tokens
from distillab.data.aligned_batches import AlignedCollate
from distillab.data.alignment import Aligner, Audit, align
from distillab.data.sides import Side, Sides, response_segments, text_example, translated
from distillab.errors import DistillabError
from distillab.models.token_bytes import END, token_bytes

TEXT = "The year 1987 had 365 days.\n\n蒸馏把大模型变小 🙂 naïve  spaces,\tand tabs."


def chunks(ours, theirs):
    return [part.tolist() for part in align(ours, theirs)]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        pytest.param([b" hel", b"lo", b" w"], [b" ", b"hello", b" w"], ([0, 0, 1], [0, 0, 1]),
                     id="several to several"),
        pytest.param([b"\xe4\xb8", b"\xad"], ["中".encode()], ([0, 0], [0]), id="half characters"),
        pytest.param([b"Hello", b" w"], [b" Hello", b" w"], ([0, 1], [0, 1]),
                     id="a space that the tokenizer adds"),
        pytest.param([b"a", b"XY", b"c"], [b"a", b"Q", b"c"], ([0, -1, 2], [0, -1, 2]),
                     id="other text between"),
        pytest.param([b"a", b"b"], [b"a", b"b", b"c"], ([0, 1], [0, 1, -1]), id="cut at the end"),
        pytest.param([b"a", b"b", b"c"], [b"a", b"b"], ([0, 1, -1], [0, 1]),
                     id="cut at the other end"),
        pytest.param([b"x"], [b"y"], ([-1], [-1]), id="nothing in common"),
        pytest.param([], [b"y"], ([], [-1]), id="nothing at all"),
    ],
)  # fmt: skip
def test_chunks_end_where_both_segmentations_do(ours, theirs, expected):
    assert chunks(ours, theirs) == list(expected)


def cut(text, places):
    bounds = [0, *sorted({place % len(text) for place in places} - {0}), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(0, 99), max_size=12),
       st.lists(st.integers(0, 99), max_size=12))  # fmt: skip
def test_every_chunk_is_the_same_text_and_no_chunk_could_be_split(text, left, right):
    ours, theirs = cut(text, left), cut(text, right)
    found = align(ours, theirs)
    count = int(found[0].max()) + 1
    ends = [set(np.cumsum([len(part) for part in side]).tolist()) for side in (ours, theirs)]
    assert count == len(ends[0] & ends[1])
    for number in range(count):
        texts = [
            b"".join(part for part, chunk in zip(side, chunk_of, strict=True) if chunk == number)
            for side, chunk_of in zip((ours, theirs), found, strict=True)
        ]
        assert texts[0] == texts[1] != b""


# ---------------------------------------------------------------------- 两个分词器


@pytest.fixture(scope="module")
def other():
    """另一个字节级 BPE：300 个 token，没有汉字，一轮以 ``</s>`` 结束。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the student learns the days of the year"] * 9, trainer)
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def sides(other, tiny_tokenizer):
    return Sides(Side(other, "student"), Side(tiny_tokenizer, "teacher"))


@pytest.fixture(scope="module")
def pieces():
    """SentencePiece 的写法：``▁`` 是空格，开头加一个，别的字由字节 token 拼成，文字之前有 BOS。"""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["the student learns the days of the year"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("turned", [False, True], ids=["of the teacher", "of the student"])
def test_pieces_with_a_space_before_every_text_are_aligned(pieces, tiny_tokenizer, turned):
    tokenizers = [pieces, tiny_tokenizer] if turned else [tiny_tokenizer, pieces]
    sides = Sides(Side(tokenizers[0], "student"), Side(tokenizers[1], "teacher"))
    ids = [i for text in (TEXT, "the days") for i in sides.student.encoder.encode([text])[0]]
    labels = [
        token if token != pieces.bos_token_id or not turned else IGNORE_INDEX for token in ids
    ]
    block = {"input_ids": torch.tensor(ids), "labels": torch.tensor([*labels[1:], IGNORE_INDEX])}
    example = text_example(block, sides, 1000)
    read = b"".join(sides.teacher.bytes[i] for i in example.teacher.ids)
    spaces = (b" ", b"") if turned else (b" ", b" ")  # 块的开头也许在一篇的中间
    assert read == spaces[0] + TEXT.encode() + END + spaces[1] + b"the days" + END
    ours, theirs = Aligner(sides).chunks(example)
    assert (ours[3:] >= 0).all()  # 第一个 token 只是上文，它的一段不要
    assert (theirs[3:] >= 0).all()
    assert ours.max() == theirs.max()


def item(sides, text, length=None):
    ids = torch.from_numpy(sides.student.encoder.encode([text])[0]).long()[:length]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:-1] = ids[1:]
    return {"input_ids": ids, "labels": labels}


def test_token_bytes_are_the_text(sides):
    for side in sides:
        ids = side.encoder.plain([TEXT])[0]
        assert b"".join(side.bytes[index] for index in ids).decode() == TEXT
        assert side.bytes[side.end] == END


def test_a_tokenizer_that_changes_text_is_refused_in_one_line(other):
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"tokens": 0, "[UNK]": 1}, "[UNK]")),
        eos_token="[UNK]",
    )
    with pytest.raises(DistillabError, match="text cannot be aligned by bytes"):
        token_bytes(lower, [], "student")


def test_a_text_block_is_read_by_the_teacher_in_its_own_tokens(sides):
    example = text_example(item(sides, TEXT), sides, 1000)
    texts = [
        b"".join(side.bytes[index] for index in view.ids).split(END)[0].decode()
        for side, view in zip(sides, (example.student, example.teacher), strict=True)
    ]
    assert texts == [TEXT, TEXT]
    ours, theirs = Aligner(sides).chunks(example)
    # 除了第一个 token 所在的一段，处处对上，连同文章的结尾。
    assert (ours[2:] >= 0).all()
    assert (theirs[2:] >= 0).all()
    assert ours.max() == theirs.max()
    assert ours[-1] == ours.max()
    assert (ours == ours[-1]).sum() == 1


@pytest.mark.parametrize("start", range(24, 60, 3))
def test_blocks_that_begin_and_end_within_a_character_leave_its_tokens_out(sides, start):
    whole = item(sides, TEXT)
    part = {name: values[start : start + 20].clone() for name, values in whole.items()}
    part["labels"][-1] = IGNORE_INDEX
    example = text_example(part, sides, 1000)
    decoded = sides.teacher.tokenizer.decode(example.teacher.ids)
    assert "\ufffd" not in decoded
    ours, theirs = Aligner(sides).chunks(example)
    assert set(ours[ours >= 0]) == set(theirs[theirs >= 0]) != set()
    for number in range(int(ours.max()) + 1):
        texts = [
            b"".join(side.bytes[i] for i, c in zip(view.labels, chunk, strict=True) if c == number)
            for side, view, chunk in zip(
                sides, (example.student, example.teacher), (ours, theirs), strict=True
            )
        ]
        assert texts[0] == texts[1]


def test_a_teacher_with_a_short_context_reads_the_beginning(sides):
    example = text_example(item(sides, TEXT), sides, 12)
    assert len(example.teacher.ids) == 12
    ours, theirs = Aligner(sides).chunks(example)
    assert ours[-1] == -1
    assert set(ours[ours >= 0]) == set(theirs[theirs >= 0]) != set()


def test_a_response_is_translated_with_its_end_and_without_half_a_character(sides):
    ids = sides.student.encoder.plain(["days 中"])[0]
    done = translated([*ids, sides.student.end], *sides)
    assert sides.teacher.tokenizer.decode(done[:-1]) == "days 中"
    assert done[-1] == sides.teacher.end
    assert sides.teacher.tokenizer.decode(translated(ids[:-1], *sides)) == "days "


def chat(sides, text, prompts=([1, 2], [3, 4, 5])):
    views = []
    for side, prompt in zip(sides, prompts, strict=True):
        ids = [*prompt, *side.encoder.plain([text])[0], side.end]
        views.append(Tokens(ids, list(range(len(prompt), len(ids)))))
    return Example(*views, response_segments(*views))


def test_a_batch_holds_both_labels_and_where_each_chunk_begins(sides):
    examples = [chat(sides, "the student"), chat(sides, "1987 days")]
    for items in (examples, [tuple(examples)]):  # 两行，或放在一行里
        batch = AlignedCollate(sides, (0, 0), 100)(items)
        found = batch.alignment
        assert batch.student.rows(batch.student.input_ids[..., None]).shape == (len(batch), 1)
        assert len(batch.teacher.index) == len(found.teacher_labels) == len(found.teacher_chunk)
        assert found.teacher_labels.tolist() == [t for e in examples for t in e.teacher.labels]
        for chunk, first in (
            (found.student_chunk, found.student_first), (found.teacher_chunk, found.teacher_first)
        ):  # fmt: skip
            assert chunk.unique().tolist() == list(range(len(found)))
            assert chunk[first].tolist() == list(range(len(found)))
            assert (first[1:] > first[:-1]).all()
        moved = batch.map(lambda tensor: tensor.clone())
        assert moved.alignment.student_chunk.equal(found.student_chunk)


def test_shared_tokens_are_those_with_the_same_bytes(sides):
    shared = sides.shared
    texts = [
        [side.bytes[index] for index in ids]
        for side, ids in zip(sides, (shared.student, shared.teacher), strict=True)
    ]
    assert texts[0] == texts[1]
    assert len(set(shared.student)) == len(set(shared.teacher)) == len(shared.student)
    assert (sides.student.end, sides.teacher.end) in zip(
        shared.student, shared.teacher, strict=True
    )


def test_every_teacher_token_has_a_first_piece_in_the_students_vocabulary(sides):
    ours, theirs = sides
    first = sides.projected.first
    assert len(first) == len(theirs.bytes)
    for index, text in enumerate(theirs.bytes):
        if text == END:
            assert ours.bytes[first[index]] == END
        else:
            assert text.startswith(ours.bytes[first[index]] or b"nothing")


def test_the_audit_counts_bytes_by_kind(sides):
    audit = Audit(Aligner(sides)).add([chat(sides, "365 days")])
    row = audit.shares()
    assert row["all"]["bytes"] == 8
    assert row["digits"]["bytes"] == 3
    assert row["white space"]["bytes"] == 1
    assert row["digits"]["one to one"] == 1.0
    for shares in row.values():
        assert sum(shares[kind] for kind in ("one to one", "one to several",
                                             "several to several", "left out")) == 1  # fmt: skip
    example = chat(sides, "365 days")
    broken = Example(example.student, chat(sides, "36X days").teacher, example.segments)
    assert Audit(Aligner(sides)).add([broken]).shares()["digits"]["left out"] == pytest.approx(
        1 / 3
    )
