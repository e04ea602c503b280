"""流与读完再切的是同样的块；各进程不重不漏；停在哪里都能接着来，与没有停过一样。"""

import json
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distillab.data.streams
from distillab.batch import collate_text
from distillab.data.articles import ArticleStream
from distillab.data.chunks import WikiDataset
from distillab.data.corpus import Corpus, text_digest
from distillab.data.encoding import ArticleEncoder
from distillab.data.streams import StreamState, TextStream
from distillab.errors import DistillabError
from distillab.train.loaders import StreamLoader
from distillab.train.state import TrainerState

ARTICLES = [f"article {n} of the teacher" + " gives soft targets" * (n % 7) for n in range(90)]
LENGTH = 16


def write(path: Path, articles) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in articles))


@pytest.fixture
def corpus(tmp_path, empty_cache) -> str:
    """五个大小不一的文件，分片数不能被两三个进程整除。"""
    sizes = [0, 40, 41, 60, 61, 90]
    for number, (start, end) in enumerate(pairwise(sizes)):
        write(tmp_path / "corpus" / f"{number}.jsonl", ARTICLES[start:end])
    return str(tmp_path / "corpus")


@pytest.fixture
def build(corpus, tiny_tokenizer):
    def build(source=corpus, **options):
        shuffle_buffer = options.pop("shuffle_buffer", 20)
        corpus = Corpus(source, **{"max_seq_len": LENGTH} | options)
        return TextStream.build(corpus, tiny_tokenizer, shuffle_buffer)

    return build


def ids(item) -> tuple[int, ...]:
    return tuple(item["input_ids"].tolist())


def epoch(stream, number=0) -> list[tuple[int, ...]]:
    """第 ``number`` 遍的全部块，按给出的次序。"""
    found = []
    for item, state in stream.items(StreamState(epoch=number)):
        if state.epoch > number:
            return found
        found.append(ids(item))
    raise AssertionError("the stream ended")


def mapped(dataset) -> list[tuple[int, ...]]:
    return [ids(dataset[i]) for i in range(len(dataset))]


# ---------------------------------------------------------------------- 同样的块


def test_an_epoch_is_the_chunks_of_the_map_style_data_in_another_order(
    build, corpus, tiny_tokenizer
):
    stream, validation = build()
    train, held_out = WikiDataset.build(corpus, tiny_tokenizer, max_seq_len=LENGTH)
    assert mapped(validation) == mapped(held_out)
    assert sorted(epoch(stream)) == sorted(mapped(train))
    assert epoch(stream) != mapped(train)
    assert sorted(epoch(stream, 1)) == sorted(mapped(train))
    assert epoch(stream, 1) != epoch(stream)
    assert epoch(build(seed=0)[0]) == epoch(stream)
    assert epoch(build(shuffle_buffer=1)[0]) == mapped(train)
    first = next(iter(stream))
    assert first["input_ids"].dtype == first["labels"].dtype == torch.int64
    assert first["labels"].tolist() == [*first["input_ids"].tolist()[1:], -100]


def test_a_buffer_is_shuffled_within_itself(build):
    ordered = epoch(build(shuffle_buffer=1)[0])
    buffers = {}
    for item, state in islice(build()[0].items(StreamState()), len(ordered)):
        buffers.setdefault(state.buffer, []).append(ids(item))
    assert len(buffers) > 3
    start = 0
    for chunks in buffers.values():
        end = start + len(chunks)
        assert sorted(chunks) == sorted(ordered[start:end])
        assert chunks != ordered[start:end] or len(chunks) < 3
        start = end


def test_the_size_cap_is_that_of_the_map_style_data(build, corpus, tiny_tokenizer):
    stream, validation = build(size_mb=0.003)
    train, held_out = WikiDataset.build(corpus, tiny_tokenizer, max_seq_len=LENGTH, size_mb=0.003)
    assert sorted(epoch(stream)) == sorted(mapped(train))
    assert mapped(validation) == mapped(held_out)
    assert len(train) < len(epoch(build()[0]))


@pytest.mark.parametrize("form", ["parquet", "json", "txt", "hub"])
def test_every_form_gives_the_same_chunks(build, tmp_path, form):
    import datasets

    data = datasets.Dataset.from_dict({"text": ARTICLES})
    path = tmp_path / f"data.{form}"
    if form == "parquet":
        data.to_parquet(path)
    elif form == "json":
        path.write_text(json.dumps(data.to_list()))
    elif form == "txt":
        path.write_text("\n\n".join(ARTICLES))
    else:
        path.mkdir()
        for number in range(3):
            data.shard(3, number, contiguous=True).to_parquet(path / f"train-{number}.parquet")
        rows = datasets.load_dataset(str(path), split="train", streaming=True)
        stream = ArticleStream(rows, "text", "hub", [], [])
        tokenizer = build()[0].encoder.tokenizer
        corpus = Corpus(str(tmp_path / "all.jsonl"), max_seq_len=LENGTH)
        found = TextStream(stream, corpus, tokenizer, 20)
        whole = epoch(found)
        states = [state for _, state in islice(found.items(StreamState()), len(whole))]
        for cut in (3, 25, len(whole) - 2):
            again = [ids(i) for i, _ in islice(found.items(states[cut]), len(whole) - cut - 1)]
            assert again == whole[cut + 1 :]
        write(tmp_path / "all.jsonl", ARTICLES)
        plain = ArticleStream.open(corpus)
        same = TextStream(plain, corpus, tokenizer, 20)
        assert epoch(same) == whole
        return
    assert epoch(build(str(path))[0]) == epoch(build()[0])


def test_only_the_beginning_is_held_out_and_its_articles_never_return(build, monkeypatch, tmp_path):
    monkeypatch.setattr(distillab.data.streams, "HEAD_MB", 0.003)
    repeated = [*ARTICLES, *ARTICLES[:30]]
    write(tmp_path / "repeated.jsonl", repeated)
    stream, validation = build(str(tmp_path / "repeated.jsonl"))
    texts = list(stream.articles)
    assert texts == repeated
    held_out = [text for text in texts if text_digest(text) in stream.held_out]
    assert validation.num_articles > 0
    assert set(held_out) <= set(ARTICLES[:60])
    assert len(held_out) == 2 * validation.num_articles  # 重复的也略过
    kept = [text for text in texts if text not in held_out]
    tokenizer = stream.encoder.tokenizer
    tokens = [t for text in kept for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    whole = len(tokens) // LENGTH
    expected = [tuple(tokens[i * LENGTH : (i + 1) * LENGTH]) for i in range(whole)]
    assert sorted(epoch(stream)) == sorted(expected)


# ---------------------------------------------------------------------- 接着来


def test_a_stream_resumed_anywhere_goes_on_as_if_it_had_never_stopped(build):
    stream, _ = build()
    whole = list(islice(stream.items(StreamState()), 300))
    assert whole[-1][1].epoch > 0  # 跨过一遍的结尾
    assert whole[100][1].buffer > 1
    for cut in range(0, 290, 23):
        saved = json.loads(json.dumps(whole[cut][1].__dict__))
        other, _ = build()
        again = islice(other.items(StreamState(**saved)), 10)
        expected = whole[cut + 1 : cut + 11]
        assert [(ids(i), s) for i, s in again] == [(ids(i), s) for i, s in expected], cut


def test_resuming_tokenises_only_the_buffer_it_was_in(build, monkeypatch):
    seen = []
    encode = ArticleEncoder.encode
    stream, _ = build()
    (*_, (_, state)) = islice(stream.items(StreamState()), 70)
    monkeypatch.setattr(
        ArticleEncoder, "encode", lambda self, t: (seen.extend(t), encode(self, t))[1]
    )
    next(stream.items(state))
    assert 0 < len(seen) < len(ARTICLES) / 2


# ---------------------------------------------------------------------- 分给各进程


def loaders(stream, processes, batch_size):
    return [
        StreamLoader(
            stream,
            SimpleNamespace(process_index=rank, num_processes=processes, device="cpu"),
            collate_text,
            batch_size,
        )
        for rank in range(processes)
    ]


def rows(window) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in window for row in batch.student.input_ids]


def windows(loader, size, count, state=None):
    state = state or TrainerState()
    for window in loader.windows(state, size, total_steps=10**9):
        yield rows(window), state
        count -= 1
        if not count:
            return


@settings(deadline=None, max_examples=12,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(processes=st.integers(1, 4), batch_size=st.integers(1, 3), size=st.integers(1, 3))
def test_ranks_share_the_stream_without_overlap_or_loss(build, processes, batch_size, size):
    stream, _ = build()
    count = 60 // (processes * batch_size * size) + 1
    parts = [
        [window for window, _ in windows(loader, size, count)]
        for loader in loaders(stream, processes, batch_size)
    ]
    each = processes * batch_size * size
    whole = [ids(item) for item, _ in islice(stream.items(StreamState()), count * each)]
    for step in range(count):
        together = [row for part in parts for row in part[step]]
        assert sorted(together) == sorted(whole[step * each : (step + 1) * each])
        assert {len(part[step]) for part in parts} == {batch_size * size}


def test_the_saved_position_is_that_of_every_rank_and_of_any_number_of_them(build):
    stream, _ = build()
    positions = []
    for loader in loaders(stream, 2, 3):
        (*_, (_, state)) = windows(loader, 2, 3)
        positions.append(state.stream)
    assert positions[0] == positions[1]
    (alone,) = loaders(stream, 1, 6)
    resumed = TrainerState(stream=json.loads(json.dumps(positions[0])))
    after = [window for window, _ in windows(alone, 2, 2, resumed)]
    whole = [window for window, _ in windows(alone, 2, 5)]
    assert after == whole[3:]


# ---------------------------------------------------------------------- 说不通的


def test_a_source_without_one_chunk_is_refused_instead_of_read_for_ever(build):
    stream, _ = build(max_seq_len=200)
    stream.max_seq_len = 100_000
    with pytest.raises(
        DistillabError, match=r"the train split has \d+ tokens, less than one chunk"
    ):
        next(stream.items(StreamState()))


def test_a_missing_field_is_named(build, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(DistillabError, match="has no field 'text'; it has body"):
        build(str(tmp_path / "other.jsonl"))


def test_the_fingerprint_follows_the_content_and_not_the_place(build, corpus, tmp_path):
    stream, _ = build()
    others = [build(seed=1)[0], build(shuffle_buffer=21)[0], build(size_mb=0.003)[0]]
    assert len({s.fingerprint for s in (stream, *others)}) == 4
    moved = Path(corpus).rename(tmp_path / "moved")
    assert build(str(moved))[0].fingerprint == stream.fingerprint


def test_bad_rows_are_skipped_named_and_counted_and_a_resume_is_bit_equal(
    build, tmp_path, tiny_tokenizer, caplog
):
    lines = [json.dumps({"text": text}).encode() for text in ARTICLES]
    bad = [b"null", b'{"text": 7}', b'{"other": 1}', b'{"text": ', b'{"text": "\xff"}']
    for number, line in enumerate(bad):
        lines.insert(17 * number, line)
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    stream, _ = build(str(tmp_path / "bad.jsonl"))
    write(tmp_path / "good.jsonl", ARTICLES)
    plain, _ = build(str(tmp_path / "good.jsonl"))
    assert epoch(stream) == epoch(plain)
    assert all(f"bad.jsonl:{17 * n + 1}" in caplog.text for n in range(5))
    assert f"5 of {len(lines)} rows skipped" in caplog.text
    train, _ = WikiDataset.build(str(tmp_path / "bad.jsonl"), tiny_tokenizer, max_seq_len=LENGTH)
    assert sorted(mapped(train)) == sorted(epoch(plain))
    whole = list(islice(stream.items(StreamState()), 120))
    for cut in (0, 30, 60, 90):
        saved = StreamState(**json.loads(json.dumps(whole[cut][1].__dict__)))
        again = islice(build(str(tmp_path / "bad.jsonl"))[0].items(saved), 5)
        assert [(ids(i), s) for i, s in again] == [(ids(i), s) for i, s in whole[cut + 1 : cut + 6]]


def test_a_source_of_mostly_bad_rows_is_refused_in_one_line(build, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n' * 50)
    with pytest.raises(DistillabError, match=r"has no field 'text'.*; 10 of 10 rows") as info:
        build(str(tmp_path / "other.jsonl"))
    assert "\n" not in str(info.value)
