"""语料：读得到什么、怎样拆分与切块、缓存什么时候失效。"""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillab.data.articles import read_hub
from distillab.data.chunks import WikiDataset
from distillab.data.corpus import Corpus, first_megabytes, text_digest
from distillab.errors import DistillabError
from distillab.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("empty_cache")

ARTICLES = [
    f"第 {i} 篇：温度越高，分布越平滑。The student reads article {i}.\n\n尾段 {i}。"
    for i in range(40)
]


def write_jsonl(path: Path, articles: list[str] = ARTICLES, field: str = "text") -> str:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(articles)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def jsonl(tmp_path) -> str:
    return write_jsonl(tmp_path / "wiki.jsonl")


def stream(dataset: WikiDataset) -> list[int]:
    return [token for i in range(len(dataset)) for token in dataset[i]["input_ids"].tolist()]


def articles_in(dataset: WikiDataset, tokenizer) -> list[str]:
    """完整出现在块里的文章；最后一段可能被切断，不算。"""
    text = tokenizer.decode(stream(dataset))
    return text.split("<|endoftext|>")[:-1]


def test_labels_are_the_next_token_and_the_last_has_none(jsonl, tiny_tokenizer):
    train, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    item = train[0]
    assert item["input_ids"].shape == item["labels"].shape == (16,)
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["labels"][:-1], item["input_ids"][1:])
    assert item["labels"][-1] == -100
    counted = sum(int((train[i]["labels"] != -100).sum()) for i in range(len(train)))
    assert train.num_tokens == counted


def test_joined_chunks_decode_to_the_articles_in_order(jsonl, tiny_tokenizer):
    for dataset in WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16):
        found = articles_in(dataset, tiny_tokenizer)
        assert len(found) >= dataset.num_articles - 1
        assert found == [text for text in ARTICLES if text in found]


def test_only_the_remainder_of_the_whole_split_is_dropped(jsonl, tiny_tokenizer):
    train, validation = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    whole = sum(len(tiny_tokenizer.encode(text)) + 1 for text in ARTICLES)
    kept = len(stream(train)) + len(stream(validation))
    assert 0 <= whole - kept < 2 * 16


def test_no_article_is_in_both_splits(jsonl, tiny_tokenizer):
    train, validation = WikiDataset.build(
        jsonl, tiny_tokenizer, max_seq_len=8, validation_fraction=0.25
    )
    assert (train.num_articles, validation.num_articles) == (30, 10)
    seen, held_out = articles_in(train, tiny_tokenizer), articles_in(validation, tiny_tokenizer)
    assert seen
    assert held_out
    assert not set(seen) & set(held_out)


def split(articles: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    corpus = Corpus("", validation_fraction=fraction, seed=seed)
    held_out = corpus.held_out([text_digest(text) for text in articles])
    pairs = list(zip(articles, held_out, strict=True))
    return [text for text, out in pairs if not out], [text for text, out in pairs if out]


@settings(deadline=None)
@given(
    articles=st.lists(st.text(min_size=1), min_size=2).filter(lambda a: len(set(a)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_every_article_is_in_exactly_one_split(articles, fraction, seed):
    train, validation = split(articles, fraction, seed)
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(articles)
    assert (train, validation) == split(articles, fraction, seed)


def test_another_seed_holds_out_other_articles():
    assert split(ARTICLES, 0.2, 0) != split(ARTICLES, 0.2, 1)


def test_the_size_cap_takes_the_first_articles(jsonl, tiny_tokenizer):
    size = sum(len(text.encode()) for text in ARTICLES[:10])
    train, validation = WikiDataset.build(
        jsonl, tiny_tokenizer, max_seq_len=8, size_mb=(size + 5) / 1e6
    )
    assert train.num_articles + validation.num_articles == 10
    assert train.text_bytes + validation.text_bytes == size


def test_reading_stops_at_the_cap():
    def endless():
        while True:
            yield "十个汉字" * 100

    assert len(list(first_megabytes(endless(), 0.01))) == 8


def test_blank_articles_are_skipped(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["", *ARTICLES, " \n\t"])
    train, validation = WikiDataset.build(path, tiny_tokenizer, max_seq_len=8)
    assert train.num_articles + validation.num_articles == len(ARTICLES)


def test_separators_written_in_an_article_are_text(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{text}<|endoftext|>尾" for text in ARTICLES])
    train, _ = WikiDataset.build(path, tiny_tokenizer, max_seq_len=8)
    separators = stream(train).count(tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert train.num_articles - 1 <= separators <= train.num_articles


def write_form(form: str, directory: Path, articles: list[str]) -> Path:
    path = directory / f"wiki.{form.split('-')[0]}"
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": range(len(articles)), "text": articles}), path)
    elif form == "txt":
        path.write_text("\ufeff" + "\n\n\n".join(articles) + "\n", encoding="utf-8")
    elif form == "jsonl":
        write_jsonl(path, articles)
    else:
        records = {
            "json-objects": [{"text": text} for text in articles],
            "json-strings": articles,
            "json-titles": {str(i): {"text": text} for i, text in enumerate(articles)},
        }
        path.write_text(json.dumps(records[form]))
    return path


@pytest.mark.parametrize(
    "form", ["parquet", "txt", "jsonl", "json-objects", "json-strings", "json-titles"]
)
def test_every_form_gives_the_same_chunks(tmp_path, tiny_tokenizer, form):
    articles = [text.replace("\n\n", "\n") for text in ARTICLES]
    expected, _ = WikiDataset.build(
        write_jsonl(tmp_path / "expected.jsonl", articles), tiny_tokenizer, max_seq_len=16
    )
    path = write_form(form, tmp_path, articles)
    train, _ = WikiDataset.build(str(path), tiny_tokenizer, max_seq_len=16)
    assert stream(train) == stream(expected)


def hub_like(tmp_path: Path) -> Path:
    """与 wikimedia/wikipedia 相同的布局：每个 config 一个目录，里面是编号的 parquet。"""
    root = tmp_path / "wikipedia"
    for config, part in [("20231101.zh", ARTICLES), ("20231101.en", ["other text"] * 9)]:
        (root / config).mkdir(parents=True)
        for number, shard in enumerate([part[:25], part[25:]]):
            file = write_form("parquet", root / config, shard)
            file.rename(root / config / f"train-{number:05d}-of-00002.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("20231101.zh", "20231101.en")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return root


def test_a_copy_of_a_hub_dataset_is_read_by_subset(tmp_path, jsonl, tiny_tokenizer):
    root = hub_like(tmp_path)
    expected, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    train, _ = WikiDataset.build(str(root), tiny_tokenizer, max_seq_len=16, subset="20231101.zh")
    assert stream(train) == stream(expected)
    with pytest.raises(DistillabError, match=r"no subset '20231101\.zhh'; did you mean"):
        WikiDataset.build(str(root), tiny_tokenizer, subset="20231101.zhh")


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    root = hub_like(tmp_path)
    assert list(read_hub(str(root), "20231101.zh", "train", "text")) == ARTICLES
    with pytest.raises(DistillabError, match="cannot load data"):
        list(read_hub(str(root), "20231101.fr", "train", "text"))
    with pytest.raises(DistillabError, match=r"no field 'body'; it has id, text"):
        list(read_hub(str(root), "20231101.zh", "train", "body"))


def test_an_unreachable_hub_is_one_line(monkeypatch, tiny_tokenizer):
    monkeypatch.setattr("distillab.data.articles.hub_is_reachable", lambda: False)
    with pytest.raises(DistillabError, match="cannot load data 'wikimedia/wikipedia': not on this"):
        WikiDataset.build("wikimedia/wikipedia", tiny_tokenizer, subset="20231101.zh")


def test_the_second_build_reads_no_text(jsonl, tiny_tokenizer, monkeypatch):
    first, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("distillab.data.chunks.write_chunks", refuse)
    second, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    assert stream(first) == stream(second)
    assert first.fingerprint == second.fingerprint
    assert (first.num_articles, first.text_bytes) == (second.num_articles, second.text_bytes)


def test_the_fingerprint_changes_with_everything_that_matters(tmp_path, jsonl, tiny_tokenizer):
    import copy

    other_tokenizer = copy.deepcopy(tiny_tokenizer)
    other_tokenizer.add_tokens(["温度"])
    other_text = write_jsonl(tmp_path / "other.jsonl", ARTICLES[1:])
    builds = [
        WikiDataset.build(source, tokenizer, **{"max_seq_len": 16, **changes})
        for source, tokenizer, changes in [
            (jsonl, tiny_tokenizer, {}),
            (other_text, tiny_tokenizer, {}),
            (jsonl, other_tokenizer, {}),
            (jsonl, tiny_tokenizer, {"max_seq_len": 8}),
            (jsonl, tiny_tokenizer, {"size_mb": 0.003}),
            (jsonl, tiny_tokenizer, {"validation_fraction": 0.3}),
            (jsonl, tiny_tokenizer, {"seed": 1}),
        ]
    ]
    assert len({dataset.fingerprint for pair in builds for dataset in pair}) == 2 * len(builds)


def test_moving_the_file_keeps_the_cache(tmp_path, jsonl, tiny_tokenizer):
    first, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    moved = Path(jsonl).rename(tmp_path / "moved.jsonl")
    assert (
        WikiDataset.build(str(moved), tiny_tokenizer, max_seq_len=16)[0].fingerprint
        == first.fingerprint
    )


def test_two_processes_tokenise_to_the_same_chunks(tmp_path, jsonl, tiny_tokenizer, monkeypatch):
    one, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "other_cache"))
    two, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16, num_proc=2)
    assert stream(one) == stream(two)


def test_a_build_killed_half_way_is_started_again(tmp_path, jsonl, tiny_tokenizer, empty_cache):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import os, sys, distillab.data.chunks as data; from distillab.models.tokenizer import load_tokenizer;"
        "data.encoded_articles = lambda *_: os._exit(9);"
        "data.WikiDataset.build(sys.argv[1], load_tokenizer(sys.argv[2]), max_seq_len=16)"
    )
    command = [sys.executable, "-c", code, jsonl, str(tmp_path / "tokenizer")]
    assert subprocess.run(command, env=os.environ.copy(), check=False).returncode == 9
    (left,) = (empty_cache / "datasets").iterdir()
    assert left.name.startswith(".")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    train, _ = WikiDataset.build(jsonl, tokenizer, max_seq_len=16)
    assert len(train) > 0


def test_a_loader_with_workers_gives_batches(jsonl, tiny_tokenizer):
    train, _ = WikiDataset.build(jsonl, tiny_tokenizer, max_seq_len=16)
    loader = torch.utils.data.DataLoader(
        train, batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    batch = next(iter(loader))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert torch.equal(batch["input_ids"][1], train[1]["input_ids"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "好"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            '{"txt": "好", "id": 1}\n',
            r"no field 'text'; it has txt, id: did you mean 'txt'",
        ),
        (
            "a.jsonl",
            '{"text": "好"}\n\n{"text": 7}\n',
            r"a\.jsonl:3: expected text in 'text', found int",
        ),
        ("a.jsonl", '{"text": null}\n', "found NoneType"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "not valid Unicode"),
        ("a.json", '[{"text": "好"}, ["好"]]', "row 1: expected text in 'text', found list"),
        ("a.json", '"好"', "expected a list or an object of records, found str"),
        ("a.json", '[\n{"text": "好"},\n]', r"a\.json:\d: not valid JSON"),
        ("a.txt", "  \n\n ", "gave no text"),
        ("a.txt", "一篇\n", "found 1 article"),
        ("a.txt", "一篇\n\n两篇\n", "the train split has .* less than one chunk of max_seq_len=16"),
        ("a.parquet", "not parquet", "cannot read parquet file"),
        ("a.csv", "text\n好", r"expected \.jsonl"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    tmp_path, tiny_tokenizer, empty_cache, name, content, message
):
    (tmp_path / name).write_text(content, encoding="utf-8")
    source = str(tmp_path / name)
    with pytest.raises(DistillabError, match=message) as info:
        WikiDataset.build(source, tiny_tokenizer, max_seq_len=16)
    assert "\n" not in str(info.value)
    assert not empty_cache.exists() or not any((empty_cache / "datasets").iterdir())


def test_text_in_another_encoding_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_bytes("知识蒸馏".encode("gb18030"))
    with pytest.raises(DistillabError, match="is not UTF-8 text"):
        WikiDataset.build(str(tmp_path / "a.txt"), tiny_tokenizer)


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path, tiny_tokenizer):
    path = write_form("parquet", tmp_path, ARTICLES)
    with pytest.raises(DistillabError, match="row 0 has no field 'body'; it has id, text"):
        WikiDataset.build(str(path), tiny_tokenizer, text_field="body")


def test_an_empty_directory_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillabError, match=r"holds no \.jsonl"):
        WikiDataset.build(str(tmp_path / "empty"), tiny_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seq_len": 1}, "max_seq_len is 1; expected at least 2"),
        ({"size_mb": 0}, "size_mb is 0; expected a positive number"),
        ({"size_mb": float("nan")}, "size_mb is nan"),
        ({"validation_fraction": 0}, "validation_fraction is 0; expected between 0 and 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"size_mb": 1e-6}, "its first article is larger"),
        ({"split": "test"}, "split 'test' does not apply"),
        ({"subset": "zh"}, "subset 'zh' does not apply to the file"),
    ],
)
def test_arguments_out_of_range_are_refused(jsonl, tiny_tokenizer, arguments, message):
    with pytest.raises(DistillabError, match=message):
        WikiDataset.build(jsonl, tiny_tokenizer, **arguments)


def test_real_articles_survive_a_real_tokenizer(wiki_json, qwen_ranks, package_cache, monkeypatch):
    source = str(wiki_json)
    with monkeypatch.context() as patch:
        patch.setenv("DISTILLAB_CACHE", str(package_cache))
        tokenizer = load_tokenizer(str(qwen_ranks))
    train, validation = WikiDataset.build(
        source, tokenizer, text_field="extract", size_mb=0.3, max_seq_len=128
    )
    articles = (a["extract"] for a in json.loads(wiki_json.read_text("utf-8")).values())
    parts = split(list(first_megabytes(articles, 0.3)), 0.1, seed=0)
    for dataset, part in zip((train, validation), parts, strict=True):
        joined = "".join(text + "<|endoftext|>" for text in part)
        # 只差最后不满一块的零头；切口可能落在一个字符的中间。
        decoded = tokenizer.decode(stream(dataset)).rstrip("\ufffd")
        joined = unicodedata.normalize("NFC", joined)
        assert joined.startswith(decoded)
        assert len(tokenizer.encode(joined[len(decoded) :])) < 128 + 4
    assert 290_000 < train.text_bytes + validation.text_bytes <= 300_000
