"""对话数据集：拆分、去重的计数、指纹，以及按长度分批。"""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from distillab.batch import Example, Tokens, collate_examples
from distillab.config.sections import DataSection
from distillab.data.chat import render
from distillab.data.chat_dataset import TOO_LONG, ChatDataset, DataReport, LengthGroupedSampler
from distillab.data.pairs import load_pairs
from distillab.errors import DistillabError

RECORDS = [
    {"id": str(i), "prompt": f"What follows {i}?", "completion": f"{i + 1}."} for i in range(40)
]


@pytest.fixture
def build(tmp_path, tiny_tokenizer):
    def call(records, *, length=64, seed=0, need_response=True, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in records))
        data = DataSection(source=str(path), format="chat", **options)
        pairs, _ = load_pairs(data, need_response=need_response)
        return ChatDataset.build(pairs, data, tiny_tokenizer, max_seq_len=length, seed=seed)

    return call


def prompts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(example.student.prompt) for example in dataset]


def examples(dataset: ChatDataset) -> list[Example]:
    return [dataset[i] for i in range(len(dataset))]


def test_an_item_is_the_rendered_conversation_with_one_view(build, tiny_tokenizer):
    train, validation, report = build(RECORDS)
    assert (len(train), len(validation)) == (report.train, report.validation) == (36, 4)
    messages = [
        {"role": "user", "content": RECORDS[0]["prompt"]},
        {"role": "assistant", "content": RECORDS[0]["completion"]},
    ]
    whole = render(messages, tiny_tokenizer, loss_on="all")
    found = [
        e for e in [*examples(train), *examples(validation)] if e.student.labels == whole.labels
    ]
    (example,) = found
    assert example.teacher is example.student
    assert example.student.ids == whole.ids[:-1]
    assert example.student.response == whole.response


def test_the_tokens_are_counted(build):
    train, validation, report = build(RECORDS)
    everything = [*examples(train), *examples(validation)]
    assert train.max_seq_len == 64
    assert train.num_tokens == sum(len(e.student.response) for e in examples(train))
    assert train.lengths == [len(e.student.ids) for e in examples(train)]
    assert report.read == report.kept == 40
    assert report.tokens == sum(len(e.student.ids) for e in everything)
    assert report.response_tokens == train.num_tokens + validation.num_tokens
    assert report.longest == report.longest_teacher == max(len(e.student.ids) for e in everything)
    assert report.lines() == [
        "40 conversations: 36 for training, 4 for validation",
        f"{report.tokens / report.kept:.0f} tokens on average, at most {report.longest}; "
        f"{report.response_tokens / report.tokens:.0%} of them in responses",
    ]


def test_the_split_depends_on_content_and_seed_but_not_on_the_order(build, tiny_tokenizer):
    train, validation, _ = build(RECORDS, validation_fraction=0.25)
    held_out = set(prompts(examples(validation), tiny_tokenizer))
    assert len(held_out) == 10
    assert not held_out & set(prompts(examples(train), tiny_tokenizer))
    _, shuffled, _ = build(random.Random(1).sample(RECORDS, 40), validation_fraction=0.25)
    assert set(prompts(examples(shuffled), tiny_tokenizer)) == held_out
    _, other, _ = build(RECORDS, validation_fraction=0.25, seed=1)
    assert set(prompts(examples(other), tiny_tokenizer)) != held_out


def test_the_same_prompt_is_never_on_both_sides(build, tiny_tokenizer):
    records = [{**record, "completion": f"answer {n}"} for n in range(3) for record in RECORDS[:10]]
    train, validation, report = build(records, validation_fraction=0.3)
    assert (len(train), len(validation)) == (21, 9)
    ours = prompts(examples(train), tiny_tokenizer)
    assert not set(ours) & set(prompts(examples(validation), tiny_tokenizer))
    assert report.duplicates == 0


def test_repeated_conversations_are_counted_and_kept(build):
    records = [{**record, "id": f"again {record['id']}"} for record in RECORDS[:5]]
    train, validation, report = build([*RECORDS, *records])
    assert report.duplicates == 5
    assert len(train) + len(validation) == 45
    assert "5 conversations repeat an earlier one" in report.lines()


def test_two_conversations_are_one_for_each_side(build):
    train, validation, _ = build(RECORDS[:2], validation_fraction=0.01)
    assert (len(train), len(validation)) == (1, 1)
    train, validation, _ = build(RECORDS[:2], validation_fraction=0.99)
    assert (len(train), len(validation)) == (1, 1)
    with pytest.raises(DistillabError, match="leaves 1 different prompts; expected at least 2"):
        build([RECORDS[0]] * 5)


def test_truncation_is_counted(build):
    long_prompt = {"prompt": "word " * 40, "completion": "42"}
    long_response = {"prompt": "Why?", "completion": "word " * 40}
    train, validation, report = build([*RECORDS, long_prompt, long_response], length=40)
    assert max(len(e.student.ids) for e in [*examples(train), *examples(validation)]) == 40
    assert (report.truncated_prompts, report.truncated_responses) == (2, 1)
    assert "2 prompts were cut to fit data.max_seq_len" in report.lines()
    assert "1 responses were cut to fit data.max_seq_len" in report.lines()


def test_what_has_no_room_for_a_response_is_dropped_and_counted(build):
    many = {"experience": "word " * 60, "experience_role": "user"}
    with pytest.raises(DistillabError, match=r"leaves 0 different prompts.*\(dropped 40: too long"):
        build(RECORDS, length=60, **many)
    train, validation, report = build(
        [*RECORDS, {"id": "x", "prompt": "word " * 60, "completion": "4"}],
        length=64,
        experience="Add one.",
    )
    assert report.dropped == {TOO_LONG.format(64): 1}
    assert f"dropped 1: {TOO_LONG.format(64)}" in report.lines()
    assert len(train) + len(validation) == 40


def test_an_error_of_the_template_names_the_row(build, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(DistillabError, match=r"data\.jsonl:1: the chat template refuses .*: no"):
        build(RECORDS)


def test_prompts_alone_are_examples_where_no_response_is_needed(build, tiny_tokenizer):
    records = [{"prompt": record["prompt"]} for record in RECORDS]
    train, _, report = build(records, need_response=False)
    assert train.num_tokens == report.response_tokens == 0
    assert train[0].student.prompt == train[0].student.ids
    assert tiny_tokenizer.decode(train[0].student.ids).endswith("<|im_start|>assistant\n")


def test_privileged_views_share_the_response(build, tiny_tokenizer):
    train, _, report = build(RECORDS, experience="Add one to it.")
    example = train[3]
    assert example.student.labels == example.teacher.labels
    assert "Add one to it." in tiny_tokenizer.decode(example.teacher.prompt)
    assert "Add one to it." not in tiny_tokenizer.decode(example.student.ids)
    assert train.lengths[3] == len(example.student.ids) + len(example.teacher.ids)
    assert report.longest_teacher > report.longest
    batch = collate_examples([train[0], train[1]], pad_id=0)
    assert len(batch) == len(train[0].student.response) + len(train[1].student.response)


def test_the_fingerprint_is_that_of_the_content(build):
    train, validation, _ = build(RECORDS)
    again, *_ = build(RECORDS)
    assert train.fingerprint == again.fingerprint != validation.fingerprint
    changed = [
        {**record, "completion": "no"} if record["id"] == "7" else record for record in RECORDS
    ]
    prints = {
        train.fingerprint + validation.fingerprint,
        "".join(part.fingerprint for part in build(changed)[:2]),
        "".join(part.fingerprint for part in build(RECORDS, length=63)[:2]),
        "".join(part.fingerprint for part in build(RECORDS, seed=5)[:2]),
        "".join(part.fingerprint for part in build(RECORDS, experience="Add one.")[:2]),
    }
    assert len(prints) == 5


def test_where_the_response_begins_is_part_of_the_fingerprint():
    def fingerprint(*views):
        return ChatDataset([Example(view, view) for view in views], max_seq_len=8).fingerprint

    long, short = Tokens([5, 1, 2, 1], [2]), Tokens([5, 1, 2], [1, 2])
    prints = {fingerprint(long), fingerprint(short), fingerprint(long, short)}
    assert len({*prints, fingerprint(short, long), fingerprint(Tokens([5, 1, 2, 1], [1]))}) == 5


def test_the_report_mentions_only_what_happened():
    report = DataReport(read=3, train=2, validation=1, tokens=30, response_tokens=15, longest=12)
    report = replace(report, longest_teacher=20)
    assert report.lines() == [
        "3 conversations: 2 for training, 1 for validation",
        "10 tokens on average, at most 12, at most 20 with what only the teacher reads; "
        "50% of them in responses",
    ]


# ---------------------------------------------------------------------- 按长度分批


def realistic_lengths(count: int) -> list[int]:
    """对数正态，中位数 180，截到 1024：与常见的指令数据相近。"""
    draw = random.Random(0)
    return [min(1024, max(12, int(draw.lognormvariate(5.2, 0.8)))) for _ in range(count)]


def padding(lengths: list[int], order: list[int], size: int) -> float:
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    computed = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed


def test_padding_stays_below_a_tenth():
    lengths = realistic_lengths(4000)
    sampler = LengthGroupedSampler(lengths, window=8)
    assert padding(lengths, list(sampler), 8) < 0.1
    shuffled = random.Random(0).sample(range(4000), 4000)
    assert padding(lengths, shuffled, 8) > 0.4


@pytest.mark.parametrize(
    ("count", "whole"), [(0, 0), (1, 1), (7, 7), (8, 8), (9, 8), (63, 56), (1003, 1000)]
)
def test_an_epoch_is_whole_windows_without_repetition(count, whole):
    sampler = LengthGroupedSampler(realistic_lengths(count), window=8)
    order = list(sampler)
    assert len(sampler) == len(order) == len(set(order)) == whole
    assert set(order) <= set(range(count))


def test_a_window_runs_from_short_to_long():
    lengths = realistic_lengths(64)
    order = [lengths[i] for i in LengthGroupedSampler(lengths, window=8)]
    for at in range(0, 64, 8):
        assert order[at : at + 8] == sorted(order[at : at + 8])


def test_the_order_is_decided_by_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthGroupedSampler(realistic_lengths(100), window=4, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # 全局的随机状态不该有影响
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_are_mixed_anew_in_each_epoch_and_come_in_no_order_of_length():
    lengths = realistic_lengths(400)
    sampler = LengthGroupedSampler(lengths, window=8)

    def batches(epoch):
        sampler.set_epoch(epoch)
        order = list(sampler)
        return [frozenset(order[at : at + 8]) for at in range(0, 400, 8)]

    first = batches(0)
    assert len(set(first) & set(batches(1))) < 5
    means = [sum(lengths[i] for i in batch) for batch in first]
    rising = sum(a < b for a, b in itertools.pairwise(means))
    assert 10 < rising < 40


def test_what_an_epoch_leaves_out_is_not_always_the_longest():
    left_out = set()
    for epoch in range(20):
        sampler = LengthGroupedSampler(list(range(33)), window=8)
        sampler.set_epoch(epoch)
        left_out |= set(range(33)) - set(sampler)
    assert len(left_out) > 8


def test_accelerate_shards_whole_batches_and_sets_the_epoch():
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader

    lengths = realistic_lengths(64)
    sampler = LengthGroupedSampler(lengths, window=8, seed=3)
    expected = LengthGroupedSampler(lengths, window=8, seed=3)
    expected.set_epoch(2)
    wanted = list(expected)
    Accelerator(cpu=True)
    seen = []
    for rank in range(2):
        loader = DataLoader(list(range(64)), batch_size=8, sampler=sampler, drop_last=True)
        prepared = prepare_data_loader(
            loader, num_processes=2, process_index=rank, even_batches=False, put_on_device=False
        )
        prepared.set_epoch(2)
        seen.append([batch.tolist() for batch in prepared])
    assert [i for pair in zip(*seen, strict=True) for batch in pair for i in batch] == wanted
