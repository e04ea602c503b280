"""文章到 token：BOS 在哪里、长文章分段与整篇一次相同、占多少内存。"""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from families import FAMILIES, MORE, SENTENCES, build, tokenizer_of
from transformers import AutoModelForCausalLM

from distillab.batch import collate_text
from distillab.data import encoding
from distillab.data.chunks import WikiDataset
from distillab.data.conversations import Message
from distillab.data.corpus import Corpus
from distillab.data.encoding import ArticleEncoder, cut_chunks
from distillab.data.streams import StreamState, TextStream
from distillab.data.truncate import fit
from distillab.evaluate.sequences import Sequences, examples_of, same_text
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.models.tokenizer import continuation_text, leading_ids
from distillab.vocabulary import Vocabulary

NAMES = [*FAMILIES, *MORE]
WITH_BOS = [name for name in FAMILIES if FAMILIES[name].adds_bos]
ARTICLES = [" ".join(random.Random(i).choices(SENTENCES, k=3)) + f" {i}" for i in range(30)]


@pytest.fixture
def corpus(tmp_path, empty_cache):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ARTICLES))
    return str(path)


def rows(data):
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tokenizer_adds_begins_every_chunk_and_article_and_is_never_a_label(name, corpus):
    tokenizer = tokenizer_of(name)
    leading, end = leading_ids(tokenizer), ArticleEncoder(tokenizer).between[0]
    assert leading == tokenizer("")["input_ids"]
    train, validation = WikiDataset.build(corpus, tokenizer, max_seq_len=48)
    for data in (train, validation):
        assert all(row[: len(leading)] == leading for row in rows(data))
        items = [data[i] for i in range(len(data))]
        assert data.num_tokens == sum(int((item["labels"] != -100).sum()) for item in items)
        assert not set(leading) & {t for item in items for t in item["labels"].tolist()}
        for row in rows(data):
            for at in (i for i, token in enumerate(row[:-1]) if token == end):
                assert row[at + 1 : at + 1 + len(leading)] == leading
    # 每个正文的 token 恰好在一块里，按原来的次序。
    whole = [token for row in rows(train) for token in row if token not in leading]
    articles = [t for text in ARTICLES for t in [text, None]]
    bare = tokenizer([t for t in articles if t], add_special_tokens=False)["input_ids"]
    texts = [[*ids, end] for ids in bare]
    kept = [ids for ids in texts if ids[:-1] and _inside(ids, whole)]
    assert len(kept) >= train.num_articles - 1
    stream, held_out = TextStream.build(Corpus(corpus, max_seq_len=48), tokenizer, 3)
    assert rows(held_out) == rows(validation)
    found = []
    for item, state in stream.items(StreamState()):
        if state.epoch:
            break
        found.append((item["input_ids"].tolist(), item["labels"].tolist()))
    assert sorted(found) == sorted(
        (r, train[i]["labels"].tolist()) for i, r in enumerate(rows(train))
    )


def _inside(part, whole):
    first = [i for i, token in enumerate(whole) if token == part[0]]
    return any(whole[i : i + len(part)] == part for i in first)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_BOS)
def test_perplexity_on_text_is_that_of_transformers_with_its_own_bos(name, corpus, tmp_path):
    directory = build(name, tmp_path / name)
    tokenizer = tokenizer_of(name)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    _, data = WikiDataset.build(corpus, tokenizer, max_seq_len=48)
    sequences = Sequences("x", examples_of(data, None), tokenizer, Vocabulary(len(tokenizer)))
    total, count = 0.0, 0
    for chunk in rows(data):
        (bos,) = leading_ids(tokenizer)
        ids = tokenizer("")["input_ids"] + chunk[1:]
        logits = model(torch.tensor([ids])).logits[0].float()
        for at in range(1, len(ids)):
            if ids[at] != bos:
                total -= float(logits[at - 1].log_softmax(-1)[ids[at]])
                count += 1
    assert sequences.tokens.sum() == count == data.num_tokens
    batch = collate_text([data[i] for i in range(len(data))])
    ours = PretrainedLM(model)
    hidden = batch.student.rows(ours(batch.student.input_ids))
    nats = torch.nn.functional.cross_entropy(ours.head.logits(hidden), batch.labels)
    assert math.exp(float(nats)) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_articles_kept_apart_in_a_chunk_begin_with_bos_and_predict_their_first_token(corpus):
    tokenizer = tokenizer_of("gemma3")
    train, _ = WikiDataset.build(corpus, tokenizer, max_seq_len=160)
    end = tokenizer.eos_token_id
    batch = collate_text([train[0]], separator=end)
    ids, positions = batch.student.input_ids[0], batch.student.position_ids[0]
    starts = (positions == 0).nonzero()[:, 0]
    assert len(starts) > 1
    assert (ids[starts] == tokenizer.bos_token_id).all()
    assert set(starts[:-1].tolist()) <= set(batch.student.index.tolist())


def test_chunks_cut_in_parts_are_the_chunks_cut_at_once():
    generator = random.Random(0)
    for leading in ([], [1], [1, 2]):
        ids = [generator.choice([3, 4, 5]) for _ in range(300)]
        for at in sorted(generator.sample(range(0, 300, 5), 12), reverse=True):
            ids[at:at] = leading
        ids = np.array(leading + ids, np.int32)
        whole, rest = cut_chunks(ids, 7, leading)
        assert whole.shape[1] == 7
        parts, left = [], np.empty(0, np.int32)
        for piece in np.array_split(ids, 40):
            chunks, left = cut_chunks(np.concatenate([left, piece]), 7, leading)
            parts.append(chunks)
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(left, rest)
        assert all(row[: len(leading)].tolist() == leading for row in whole)


@pytest.mark.parametrize("other", ["qwen2.5", "gemma3", "mistral"])
@pytest.mark.parametrize("name", ["qwen2.5", "gemma3", "llama3"])
def test_another_tokenizer_reads_the_same_text_with_its_own_bos(name, other, corpus):
    tokenizer, theirs = tokenizer_of(name), tokenizer_of(other)
    _, data = WikiDataset.build(corpus, tokenizer, max_seq_len=64)
    sequences = Sequences("x", examples_of(data, None), tokenizer, Vocabulary(len(tokenizer)))
    found = same_text(sequences, tokenizer, theirs)
    leading = leading_ids(theirs)
    for example in found.examples:
        assert example.student.ids[: len(leading)] == leading
        assert not set(leading) & set(example.student.labels)
    whole = [text for text in sequences.texts if "\ufffd" not in text]
    assert whole
    # 文章开头的 ▁ 解码成空格，不是正文的。
    assert {t.replace(" ", "") for t in whole} <= {t.replace(" ", "") for t in found.texts}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "mistral", "lfm2", "qwen2.5"])
def test_a_prompt_cut_from_the_left_keeps_its_bos(name):
    tokenizer = tokenizer_of(name)
    messages: list[Message] = [
        {"role": "user", "content": " ".join(SENTENCES)},
        {"role": "assistant", "content": "Paris."},
    ]
    fitted = fit([messages], tokenizer, 60, loss_on="all")
    assert fitted is not None
    assert fitted.prompt_cut
    (tokens,) = fitted.views
    leading = leading_ids(tokenizer)
    assert tokens.ids[: len(leading)] == leading
    assert len(tokens.ids) == 60
    assert tokenizer.decode(tokens.labels).strip().startswith("Paris.")


# ---------------------------------------------------------------------- 长文章


def long_texts():
    generator = random.Random(3)
    words = [
        "distil",
        "teacher",
        "知识",
        "蒸馏",
        "don't",
        "",
        "",
        "12345",
        "émigré",
        "🙂",
        "\n",
        "\n\n\t",
        "<|endoftext|>",
        "<s>",
        "...",
    ]
    mixed = "".join(
        generator.choice(words) + generator.choice(["", " ", "  ", "\n"]) for _ in range(4000)
    )
    cjk = "".join(generator.choice("知识蒸馏让小模型学习大模型的输出分布。，") for _ in range(9000))
    return {"mixed": mixed, "cjk": cjk, "one word": "a" * 9000, "spaces": " " * 9000 + "a",
            "lines": "\n" * 5000 + "x\n" * 2000}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_long_article_in_pieces_is_the_article_at_once(name, monkeypatch):
    encoder = ArticleEncoder(tokenizer_of(name))
    monkeypatch.setattr(encoding, "TOGETHER", 2500)
    pieces = {}
    for kind, text in long_texts().items():
        expected = encoder.plain([text])[0]
        (found,) = encoder.encode([text])
        assert found[len(encoder.between) - 1 : -1].tolist() == expected, kind
        given = [len(piece) for piece in encoder._pieces(text) or []]
        pieces[kind] = len(given)
    assert pieces["mixed"] > 3
    assert pieces["cjk"] > 2


def test_memory_of_tokenising_is_bounded(tmp_path):
    tokenizer_of("qwen2.5").save_pretrained(tmp_path / "tokenizer")
    text = " ".join(SENTENCES) + "\n"
    article = text * (3_000_000 // len(text.encode()))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in ("first", "second", article))
    )
    code = (
        "import resource, sys;from distillab.data.chunks import WikiDataset;"
        "from distillab.models.tokenizer import load_tokenizer;import datasets, pyarrow;"
        "tokenizer = load_tokenizer(sys.argv[2]);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "WikiDataset.build(sys.argv[1], tokenizer, max_seq_len=2, validation_fraction=0.3);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "tokenizer")]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"DISTILLAB_CACHE": str(tmp_path / "cache")},
    )
    assert int(found.stdout) * 1024 < 260e6


# ---------------------------------------------------------------------- 续写的文字


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_continuation_join_as_they_were_written(name):
    tokenizer = tokenizer_of(name)
    text = "The capital of France is Paris, and more. 中国的首都"
    ids = tokenizer(text)["input_ids"]
    for cut in range(1 + len(leading_ids(tokenizer)), len(ids)):
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if "\ufffd" not in prompt:
            assert prompt + continuation_text(tokenizer, ids[:cut], ids[cut:]) == text
    assert continuation_text(tokenizer, [], ids) == text


def test_generated_text_keeps_the_space_after_the_prompt(tmp_path):
    tokenizer = tokenizer_of("mistral")
    model = PretrainedLM(AutoModelForCausalLM.from_pretrained(build("mistral", tmp_path / "m")))
    generator = TextGenerator(model, tokenizer)
    new = tokenizer("is Paris", add_special_tokens=False)["input_ids"]

    def write(*_, on_token=None, **__):
        for token in new if on_token else []:
            on_token(torch.tensor([0]), torch.tensor([token]))
        return torch.tensor([new])

    generator.generate_ids = write
    parts = []
    assert generator.generate("France", stream=parts.append) == [" is Paris"]
    assert "".join(parts) == " is Paris"
    assert generator.generate([tokenizer("France")["input_ids"]]) == ["is Paris"]
