"""每一种别人写的输入，从一份好的改坏，再让产品去读。

一个读者先备好材料，``read(random)`` 改坏一份、读一次：读得懂就返回，读不懂抛 ``DistillabError``；
不该变的东西变了，``assert`` 不过。
"""

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import families
import torch
import yaml
from mutate import content, structure
from report_runs import write_run
from stub_server import Stub, completion

from distillab.config.model_sections import ModelConfig
from distillab.config.recipes import dump_recipe, load_recipe, shipped_recipes
from distillab.config.schema import EvaluateConfig, TrainingConfig
from distillab.config.sections import SamplingConfig, ServerConfig
from distillab.data.articles import read_files, text_files
from distillab.data.chat import render, render_prompt
from distillab.data.chunks import WikiDataset
from distillab.data.conversations import parse_conversation, read_conversations
from distillab.data.pairs import Task
from distillab.models.interface import PretrainedLM
from distillab.models.pretrained import load_pretrained
from distillab.models.student import StudentModel
from distillab.models.tokenizer import document_separator, load_tokenizer, tokenizer_fingerprint
from distillab.plan.shapes import find_shape
from distillab.report.page import write_report
from distillab.report.run_data import read_run
from distillab.report.terminal_tables import runs_table
from distillab.synthesize.questions import Question
from distillab.synthesize.server_backend import ServerBackend
from distillab.train.trainer import DistillationTrainer

TEXTS = [f"Article {n}. {families.SENTENCES[n % 6]} {'词 ' * (n % 5)}" for n in range(40)]


class Reader:
    """一种输入。"""

    name = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, random: Random) -> None:
        """改坏一份，读一次。"""
        raise NotImplementedError


class Recipes(Reader):
    """配方：读得懂的，写出来再读还是它。"""

    name = "recipes"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.texts = [path.read_text() for path in shipped_recipes().values()]
        self.texts = [text for text in self.texts if "extends:" not in text]
        self.texts += [dump_recipe(load_recipe(name)) for name in shipped_recipes()]

    def read(self, random: Random) -> None:
        text = random.choice(self.texts)
        if random.random() < 0.6:
            changed = structure(yaml.safe_load(text), random)
            dump = random.choice((json.dumps, lambda v: yaml.safe_dump(v, allow_unicode=True)))
            data = dump(changed).encode("utf-8", "surrogatepass")
        else:
            data = content(text.encode(), random)
        path = self.directory / "r.yaml"
        path.write_bytes(data)
        recipe = load_recipe(str(path), random.choice(([], ["train.seed=2026-13-45"], ["a=!!x 1"])))
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        both = [one.model_dump(mode="json") for one in (recipe, load_recipe(str(path)))]
        assert both[0] == both[1], "the saved recipe differs"


class Rows(Reader):
    """语料文件：jsonl、json、txt、parquet。"""

    name = "rows"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows = [{"text": text, "id": n, "tags": ["a", None]} for n, text in enumerate(TEXTS)]
        parquet = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows), parquet)
        self.files = {
            ".parquet": parquet.getvalue(),
            ".json": json.dumps(self.rows, ensure_ascii=False).encode(),
            ".jsonl": "\n".join(json.dumps(row) for row in self.rows).encode(),
            ".txt": "\n\n".join(TEXTS).encode(),
        }

    def read(self, random: Random) -> None:
        suffix = random.choice(list(self.files))
        data = self.files[suffix]
        if suffix.startswith(".json") and random.random() < 0.6:
            rows = structure(self.rows, random)
            data = json.dumps(rows).encode()
            if suffix == ".jsonl" and isinstance(rows, list):
                data = "\n".join(json.dumps(row) for row in rows).encode()
        else:
            data = content(data, random)
        path = self.directory / f"rows{suffix}"
        path.write_bytes(data)
        list(read_files(text_files(path), "text"))


class Conversations(Reader):
    """对话：各种写法的一条记录，读懂之后还要渲染得出。"""

    name = "conversations"

    TURNS: ClassVar = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?", "weight": 1},
        {"role": "assistant", "content": "2", "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "And 2 + 2?"}]},
        {"role": "assistant", "content": "4"},
    ]
    RECORDS: ClassVar = [
        {"id": "a", "messages": TURNS, "answer": "4", "source": "made"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
         "system": "Be brief."},
        {"prompt": "q", "completion": "a"},
        {"prompt": TURNS[:2], "completion": [TURNS[4]]},
        {"instruction": "add", "input": "1 and 1", "output": "2", "history": [["q", "a"]]},
        {"text": "### Human: q### Assistant: a### Human: r### Assistant: b"},
    ]  # fmt: skip

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.tokenizers = [families.tokenizer_of(name) for name in ("qwen2.5", "gemma3", "mistral")]

    def read(self, random: Random) -> None:
        record = random.choice(self.RECORDS)
        if random.random() < 0.2:
            data = content(json.dumps(record).encode(), random)
            path = self.directory / "c.jsonl"
            path.write_bytes(data)
            found = list(read_conversations(str(path)))
        else:
            found = [parse_conversation(structure(record, random), "here", need_response=True)]
        tokenizer = random.choice(self.tokenizers)
        for conversation in found:
            tokens = render(conversation.messages, tokenizer, loss_on="all")
            render_prompt(conversation.prompt, tokenizer)
            assert tokens.response, "a conversation without a response token"


class Directory(Reader):
    """一个目录里的某个文件；每次从好的那份抄起。"""

    def copy(self, source: Path) -> Path:
        target = self.directory / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=os.link)
        return target

    def damage(self, file: Path, random: Random, structured: float = 0.6) -> None:
        data = file.read_bytes()
        if file.suffix == ".json" and random.random() < structured:
            data = json.dumps(structure(json.loads(data), random)).encode()
        elif file.suffix == ".jsonl" and random.random() < structured:
            rows = structure([json.loads(line) for line in data.splitlines()], random)
            rows = rows if isinstance(rows, list) else [rows]
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            data = content(data, random)
        file.unlink()  # 是硬链接：不能改到原件
        file.write_bytes(data)


class Configs(Directory):
    """模型的 ``config.json`` 与 ``generation_config.json``：读得懂的要算得出 logits。"""

    name = "configs"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        names = list(families.FAMILIES)
        self.sources = [families.build(name, directory / name) for name in names]

    def read(self, random: Random) -> None:
        target = self.copy(random.choice(self.sources))
        self.damage(
            target / random.choice(("config.json",) * 3 + ("generation_config.json",)), random
        )
        model = PretrainedLM(load_pretrained(str(target), dtype=torch.float32))
        with torch.no_grad():
            model.logits(model(torch.tensor([[1, 2, 3]])))
        find_shape(str(target))


class Tokenizers(Directory):
    """``tokenizer.json`` 与 ``tokenizer_config.json``：读得懂的要切得了词、渲染得出对话。"""

    name = "tokenizers"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.sources = []
        for name in ("qwen2.5", "gemma3", "llama3"):
            families.tokenizer_of(name).save_pretrained(directory / name)
            self.sources.append(directory / name)

    def read(self, random: Random) -> None:
        target = self.copy(random.choice(self.sources))
        names = sorted(path.name for path in target.iterdir())
        self.damage(target / random.choice(names), random)
        tokenizer = load_tokenizer(str(target))
        tokenizer_fingerprint(tokenizer)
        document_separator(tokenizer)
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        render(messages, tokenizer, loss_on="last")


class Checkpoints(Directory):
    """检查点：要么与存下时一样，要么退到前一个。"""

    name = "checkpoints"

    SMALL: ClassVar = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
             "intermediate_size": 16, "vocab_size": 64, "max_seq_len": 16}  # fmt: skip

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        from accelerate.state import AcceleratorState

        self._reset = lambda: AcceleratorState._reset_state(reset_partial_state=True)
        trainer = self._trainer(directory / "run", 4)
        trainer.train()
        self.run = directory / "run"
        self.good = self._states()

    def _trainer(self, run: Path, steps: int) -> DistillationTrainer:
        self._reset()
        torch.manual_seed(0)
        ids = (torch.arange(8)[:, None] + 3 * torch.arange(12)) % 64
        data = [{"input_ids": row, "labels": torch.cat([row[1:], torch.tensor([-100])])}
                for row in ids]  # fmt: skip
        config = TrainingConfig(batch_size=4, max_steps=steps, warmup_steps=1, log_interval=1,
                                eval_interval=1000, save_interval=2, alpha=0.0)  # fmt: skip
        return DistillationTrainer(StudentModel(ModelConfig(**self.SMALL)), None, data, data[:2],
                                   config, run, evaluate=EvaluateConfig(batch_size=2))  # fmt: skip

    def _states(self) -> dict[int, Any]:
        """``{步: 从那里接着训练到第 4 步的权重}``，两者本该相同。"""
        return {4: self._weights(self._resumed(self.run))}

    def _resumed(self, run: Path) -> DistillationTrainer:
        trainer = self._trainer(run, 4)
        trainer.train(resume=True)
        return trainer

    @staticmethod
    def _weights(trainer: DistillationTrainer) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in trainer.student.parameters()])

    def read(self, random: Random) -> None:
        target = self.copy(self.run)
        steps = sorted((target / "checkpoints").glob("step-*"))
        step = random.choice(steps)
        files = sorted(path for path in step.rglob("*") if path.is_file())
        file = random.choice(files)
        before = file.read_bytes()
        self.damage(file, random, structured=0.5)
        if file.read_bytes() == before:
            return
        found = self._weights(self._resumed(target))
        assert torch.equal(found, self.good[4]), f"{step.name}/{file.name} trains something else"


class Caches(Directory):
    """分好块的语料缓存：坏了就重建，读出的 token 不变。"""

    name = "caches"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        families.tokenizer_of("qwen2.5").save_pretrained(directory / "tokenizer")
        self.tokenizer = load_tokenizer(str(directory / "tokenizer"))
        self.text = directory / "text.jsonl"
        self.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        self.cache = directory / "cache"
        os.environ["DISTILLAB_CACHE"] = str(self.cache)
        self.good = self._read()
        self.files = [path.relative_to(self.cache) for path in sorted(self.cache.rglob("*"))
                      if path.is_file() and path.stat().st_size]  # fmt: skip

    def _read(self) -> list[list[int]]:
        both = WikiDataset.build(str(self.text), self.tokenizer, max_seq_len=16)
        return [chunk["input_ids"].tolist() for data in both for chunk in data]

    def read(self, random: Random) -> None:
        os.environ["DISTILLAB_CACHE"] = str(self.copy(self.cache))
        file = random.choice(self.files)
        self.damage(self.directory / "copy" / file, random, structured=0.5)
        assert self._read() == self.good, f"{file} gives other tokens"


class Reports(Directory):
    """运行目录：报告与列表。"""

    name = "reports"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.run = write_run(directory / "run", evaluated=True, rollouts=True)
        self.files = [path.relative_to(self.run) for path in sorted(self.run.rglob("*"))
                      if path.is_file()]  # fmt: skip

    def read(self, random: Random) -> None:
        target = self.copy(self.run)
        file = random.choice(self.files)
        self.damage(target / file, random)
        runs_table([read_run(target)])
        write_report([target], None)


class Replies(Reader):
    """服务的回复。"""

    name = "replies"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            os.environ.pop(name, None)
        self.stub = Stub()
        threading.Thread(target=self.stub.serve_forever, args=(0.02,), daemon=True).start()
        config = ServerConfig(base_url=self.stub.url, model="m", max_retries=0, timeout=5)
        self.backend = lambda: ServerBackend(config, SamplingConfig(temperature=1.0))

    def read(self, random: Random) -> None:
        reply = completion("It is 4.", logprobs=None, reasoning=None)
        status = random.choice((200,) * 6 + (400, 404, 429, 500, 302, 204, 299))
        if random.random() < 0.7:
            data = json.dumps(structure(reply, random)).encode("utf-8", "surrogatepass")
        else:
            data = content(json.dumps(reply).encode(), random)
        headers = random.choice(
            ({}, {}, {"Content-Type": "text/html"}, {"Content-Encoding": "gzip"},
             {"Content-Type": "application/json; charset=utf-16"}, {"Retry-After": "0"})
        )  # fmt: skip
        self.stub.script = lambda number, body: (status, data, headers)
        self.stub.bodies.clear()
        task = Task("t", [{"role": "user", "content": "q"}], "4", {})
        for outcomes in self.backend().answer([Question(task, 0, 1)], lambda: False):
            for outcome in outcomes:
                json.dumps(vars(outcome), default=str)


READERS: dict[str, Callable[[Path], Reader]] = {
    reader.name: reader
    for reader in (Recipes, Rows, Conversations, Configs, Tokenizers, Checkpoints, Caches, Reports,
                   Replies)
}  # fmt: skip
