"""本地目录的 split 与 ``datasets`` 认的一样；没有 split 可言的目录照旧全读。"""

import json
import logging
from pathlib import Path

import datasets
import pytest

from distillab.data.articles import ArticleStream, read_files, text_files
from distillab.data.conversations import read_conversations
from distillab.data.corpus import Corpus
from distillab.errors import DistillabError

CARD = """---
license: mit
configs:
{configs}
---
# A data set
"""
TWO = """- config_name: zh
  data_files:
  - {split: train, path: "zh/part*.jsonl"}
  - {split: heldout, path: [zh/rest.jsonl]}
- config_name: en
  default: true
  data_dir: en
"""


def write(root: Path, names, card=None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    if card is not None:
        (root / "README.md").write_text(CARD.format(configs=card))
    return root


def read(root, subset=None, split="train"):
    return list(read_files(text_files(root, subset, split), "text"))


LAYOUTS = {
    "names": ["train.jsonl", "test.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
               "data/hard-00000-of-00001.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "test/deep/a.jsonl"],
    "words": ["my-train_0.jsonl", "my-valid.1.jsonl", "my eval.jsonl"],
    "folder of one": ["corpus/training/a.jsonl", "corpus/other/b.jsonl"],
    "a name that only contains the word": ["contest.jsonl", "trainer.jsonl", "latest.jsonl"],
    "numbers": ["train01.jsonl", "test02.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["plain", ".hidden/a[1]*b"])
def test_splits_are_those_of_datasets(tmp_path, layout, place):
    root = write(tmp_path / place, LAYOUTS[layout])
    write(root, [".cache/train.jsonl"])  # 隐藏的不算
    unlike = place != "plain"  # datasets 自己认不出名字里的 [1]*
    twin = write(tmp_path / "twin", LAYOUTS[layout]) if unlike else root
    expected = datasets.load_dataset(str(twin), cache_dir=str(tmp_path / "cache"), streaming=True)
    plain = set(expected) == {"train"} and layout == "a name that only contains the word"
    for split in expected:
        rows = {row["text"] for row in expected[split]}
        found = read(root, split=split)
        assert set(found) == rows | ({".cache/train.jsonl"} if plain else set())
        assert len(found) == len(set(found))
    missing = "validation" if "validation" not in expected else "nothing"
    with pytest.raises(DistillabError, match=f"has no split '{missing}'; "):
        read(root, split=missing)


def test_configs_of_the_card_are_honoured(tmp_path):
    names = ["zh/part1.jsonl", "zh/part2.jsonl", "zh/rest.jsonl", "en/train.jsonl",
             "en/test.jsonl", "fr/train.jsonl", "fr/dev.jsonl"]  # fmt: skip
    root = write(tmp_path, names, TWO)
    for subset, split in ((None, "train"), ("en", "test"), ("zh", "train"), ("zh", "heldout")):
        expected = datasets.load_dataset(
            str(root), subset, split=split, streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert read(root, subset, split) == [row["text"] for row in expected]
    assert read(root, "fr") == ["fr/train.jsonl"]  # 没有这个 config 的子目录
    assert read(root, "fr", "validation") == ["fr/dev.jsonl"]
    card = "- {config_name: whole, data_dir: zh}\n- {config_name: b, default: true, data_dir: en}"
    write(root, [], card)
    assert sorted(read(root, "whole")) == ["zh/part1.jsonl", "zh/part2.jsonl", "zh/rest.jsonl"]
    assert read(root) == ["en/train.jsonl"]
    write(root, [], TWO)
    with pytest.raises(DistillabError, match="has no subset 'de'; choose from en, zh"):
        read(root, "de")
    with pytest.raises(DistillabError, match="has no split 'test'; choose from heldout, train"):
        read(root, "zh", "test")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (TWO.replace("default: true", "description: x"), "several configs and no default: set sub"),
        ("- config_name: a\n  data_files: ../../secret.jsonl", "expected a path inside"),
        ("- config_name: a\n  data_files: /etc/passwd", "names '/etc/passwd', expected a path"),
        ("- config_name: a\n  data_files: [{split: train, path: 'https://h/x.jsonl'}]", "inside"),
        ("- config_name: a\n  data_dir: ..", "names '..', expected a path inside"),
        ("- config_name: a\n  data_files: zip://x.jsonl::a.zip", "expected a path inside"),
        ("- config_name: a\n  data_files: 3", "README.md: configs: "),
        ("- {data_files: x}", "README.md: configs: "),
        ("- x", "README.md: configs"),
        ("  a: b: c", "not valid YAML"),
        ("- config_name: a\n  data_files: nothing*.jsonl", "holds no .jsonl, .parquet"),
        ("- config_name: a\n  data_dir: nowhere", "nowhere' holds no .jsonl"),
    ],
)
def test_a_card_that_cannot_be_meant_is_one_line(tmp_path, card, message):
    root = write(tmp_path / "root", ["zh/part1.jsonl"], card)
    with pytest.raises(DistillabError, match=message) as caught:
        read(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("card", [None, "", "tags: [a]"])
def test_a_directory_without_splits_is_read_whole_as_before(tmp_path, card):
    root = write(tmp_path, ["b.jsonl", "a/x.jsonl", "a/.kept.jsonl", "README.jsonl"])
    (root / "notes.txt").write_text("one\n\ntwo\n")
    (root / "dataset_infos.json").write_text("{}")
    if card is not None:
        (root / "README.md").write_text(f"---\n{card}\n---\n# 目录\n")
    assert [str(file.relative_to(root)) for file in text_files(root)] == [
        "README.jsonl", "a/.kept.jsonl", "a/x.jsonl", "b.jsonl", "notes.txt",
    ]  # fmt: skip
    assert [str(file.relative_to(root)) for file in text_files(root, "a")] == [
        "a/.kept.jsonl", "a/x.jsonl",
    ]  # fmt: skip
    with pytest.raises(DistillabError, match="has no split 'test'; choose from train"):
        text_files(root, split="test")


def test_every_reader_takes_the_split(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("distillab"), "propagate", True)
    root = tmp_path / "chat"
    for name in ("train", "validation", "test"):
        write(root, [f"{name}.jsonl"])
        (root / f"{name}.jsonl").write_text(json.dumps(
            {"prompt": name, "completion": "x", "text": name}) + "\n")  # fmt: skip
    (root / "train.txt").write_text("running text")
    with caplog.at_level("INFO", logger="distillab"):
        found = [one.question for one in read_conversations(str(root), split="test")]
    assert found == ["test"]
    assert f"{root}: read 1 of its 4 files: split test of train, validation, test" in caplog.text
    assert [one.question for one in read_conversations(str(root))] == ["train"]
    stream = ArticleStream.open(Corpus(str(root), split="validation"))
    assert list(stream) == ["validation"]
    with pytest.raises(DistillabError, match="split 'test' does not apply to the file"):
        list(read_conversations(str(root / "train.jsonl"), split="test"))


def test_a_dataset_saved_to_disk_says_what_to_write_instead(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DistillabError, match=r"was written by save_to_disk, .* with to_parquet"):
        text_files(tmp_path / "saved")
