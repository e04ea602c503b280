"""裁剪过的分词器：语料切得逐个相同，别的文字仍是自己，特殊 token 与 chat template 照旧。"""

import json
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, SENTENCES, byte_level, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from distillab.data.encoding import ArticleEncoder
from distillab.errors import DistillabError
from distillab.models.tokenizer import load_tokenizer, vocab_limit
from distillab.models.trimming import BpeRules, ids_before

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BPE = [name for name in FAMILIES if name != "lfm2"]


def counted(tokenizer, texts):
    """``(各篇的 id, 各个 id 的次数)``。"""
    ids = ArticleEncoder(tokenizer).encode(texts)
    return ids, np.bincount(np.concatenate(ids), minlength=vocab_limit(tokenizer))


def trimmed(tokenizer, texts, directory: Path, coverage=1.0):
    """``(裁剪过的, 留下的原来的 id)``。"""
    rules = BpeRules(tokenizer)
    kept = rules.kept(counted(tokenizer, texts)[1], coverage)
    return rules.write(kept, directory), np.array(kept)


def again(tokenizer, text):
    """编码再解码。"""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def check_same(full, small, kept, texts):
    for before, after in zip(
        ArticleEncoder(full).encode(texts), ArticleEncoder(small).encode(texts), strict=True
    ):
        assert kept[after].tolist() == before.tolist()


@pytest.fixture(scope="module", params=BPE)
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    tokenizer_of(request.param).save_pretrained(directory / "full")
    full = load_tokenizer(str(directory / "full"))
    small, kept = trimmed(full, SENTENCES[:3], directory / "trimmed")
    return full, small, kept


def test_the_text_is_split_into_the_same_tokens(family):
    full, small, kept = family
    assert len(kept) < len(full) - 10
    check_same(full, small, kept, SENTENCES[:3])


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_any_other_text_is_encoded_and_decoded_as_before(family, text):
    full, small, _ = family
    assert again(small, text) == again(full, text)


def test_chat_special_tokens_and_what_is_added_are_the_same_under_new_ids(family):
    full, small, kept = family
    new = {old: index for index, old in enumerate(kept.tolist())}
    chat = [{"role": "user", "content": SENTENCES[0]}, {"role": "assistant", "content": "A small"}]
    for text in (SENTENCES[1], full.apply_chat_template(chat, tokenize=False)):
        assert small(text)["input_ids"] == [new[i] for i in full(text)["input_ids"]]
    assert small.apply_chat_template(chat, tokenize=False) == full.apply_chat_template(
        chat, tokenize=False
    )
    assert small.special_tokens_map == full.special_tokens_map
    assert {
        new[i]: str(t) for i, t in full.added_tokens_decoder.items()
    } == {i: str(t) for i, t in small.added_tokens_decoder.items()}  # fmt: skip
    own = {index: token for token, index in small.get_vocab().items()}
    names = {index: token for token, index in full.get_vocab().items()}
    assert [own[i] for i in range(len(own))] == [names[old] for old in kept]
    assert kept.tolist() == sorted(kept)


def extracts(wiki_json):
    return [row["extract"] for row in json.loads(wiki_json.read_text()).values()]


def test_real_smollm2_splits_every_document_alike(smollm2_dir, wiki_json, tmp_path):
    texts = extracts(wiki_json)[:800]
    full = load_tokenizer(str(smollm2_dir))
    small, kept = trimmed(full, texts, tmp_path)
    assert len(kept) < 0.5 * len(full)
    check_same(full, small, kept, texts)
    check_round_trips(full, small)


def test_real_qwen_splits_every_document_alike(qwen_ranks, wiki_json, tmp_path):
    texts = extracts(wiki_json)[:200] + SENTENCES
    full = load_tokenizer(str(qwen_ranks))
    small, kept = trimmed(full, texts, tmp_path)
    assert len(kept) < 0.15 * len(full)
    check_same(full, small, kept, texts)
    check_round_trips(full, small)
    assert type(small) is type(full)
    assert small.convert_tokens_to_ids("<|im_end|>") == len(kept) - len(full) + 151645


def check_round_trips(full, small):
    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text):
        assert again(small, text) == again(full, text)

    check()


def test_below_full_coverage_rare_tokens_are_split_and_nothing_is_lost(smollm2_dir, tmp_path):
    full = load_tokenizer(str(smollm2_dir))
    counts = np.zeros(len(full), np.int64)
    often, rare = (full(text)["input_ids"] for text in (" teacher teacher teacher", " distillery"))
    for ids in (often, rare):
        np.add.at(counts, ids, 1)
    rules = BpeRules(full)
    kept = rules.kept(counts, 0.6)
    assert set(often) <= set(kept)
    assert not set(rare) <= set(kept)
    small = rules.write(kept, tmp_path)
    assert again(small, " distillery") == " distillery"
    assert [kept[i] for i in small(" teacher")["input_ids"]] == full(" teacher")["input_ids"]


def test_a_dropped_token_falls_to_the_first_piece_of_its_own_text(family):
    full, small, kept = family
    rules = BpeRules(full)
    first = rules.first_pieces(kept.tolist())
    dropped = set(full.get_vocab().values()) - set(kept.tolist())
    assert first.keys() == dropped
    plain = json.loads(small.backend_tokenizer.to_str()) | {
        "normalizer": None, "pre_tokenizer": None, "added_tokens": [], "post_processor": None,
    }  # fmt: skip
    alone = Tokenizer.from_str(json.dumps(plain))  # 只有 BPE：token 的写法就是它的输入
    for old in dropped:
        assert first[old] == alone.encode(rules.token_of[old]).ids[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_merges_and_several_ways_to_a_token_split_alike(tmp_path_factory, data):
    letters = [chr(ord("a") + i) for i in range(4)]
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for _ in range(data.draw(st.integers(1, 14))):
        known = [t for t in vocab if set(t) <= set(letters)]
        pair = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        if pair not in merges:
            merges.append(pair)
            vocab += [t for t in ["".join(pair)] if t not in vocab]
    backend = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocab)},
            merges,
            ignore_merges=data.draw(st.booleans()),
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    full = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")
    words = st.text(st.sampled_from(letters), min_size=1, max_size=10)
    texts = data.draw(st.lists(words, min_size=1, max_size=4))
    small, kept = trimmed(full, texts, tmp_path_factory.mktemp("merges"))
    check_same(full, small, kept, texts)
    other = data.draw(words)
    assert again(small, other) == other


def trained(model, trainer, **steps):
    backend = Tokenizer(model)
    for name, step in steps.items():
        setattr(backend, name, step)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")


def test_tokenizers_of_another_kind_are_refused_by_name(tmp_path):
    unigram = trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=90, show_progress=False))
    with pytest.raises(DistillabError, match="cannot trim this tokenizer: found a Unigram"):
        BpeRules(unigram)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(DistillabError, match="found a WordPiece tokenizer"):
        BpeRules(BertTokenizer(str(tmp_path / "vocab.txt")))
    words = trained(models.BPE(), trainers.BpeTrainer(vocab_size=90, show_progress=False))
    with pytest.raises(DistillabError, match="one without byte tokens"):
        BpeRules(words)
    small = trainers.BpeTrainer(vocab_size=300, show_progress=False)  # 没有用到的字节不在其中
    level = trained(models.BPE(), small, pre_tokenizer=pre_tokenizers.ByteLevel())
    with pytest.raises(DistillabError, match="byte tokens, such as"):
        BpeRules(level)
    spec = json.loads(byte_level(r"\s+", ["<e>"]).to_str())
    spec["model"]["dropout"] = 0.1
    dropping = Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(DistillabError, match=r"one with dropout=0\.1"):
        BpeRules(PreTrainedTokenizerFast(tokenizer_object=dropping, eos_token="<e>"))


def test_what_was_cut_from_a_tokenizer_is_known_again(family):
    full, small, kept = family
    assert ids_before(small, full) == kept.tolist()
    assert ids_before(full, full) == [*range(len(full))]
    assert ids_before(full, small) is None


def test_another_tokenizer_is_no_cut():
    qwen, llama = tokenizer_of("qwen2.5"), tokenizer_of("llama3")
    assert ids_before(qwen, llama) is None
    assert ids_before(qwen, tokenizer_of("gemma3")) is None
