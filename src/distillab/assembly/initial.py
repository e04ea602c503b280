"""``student.init`` 变成学生的起点：从哪个模型、留哪些层，各层再裁到多宽。

选层与裁窄要看训练数据，又要前向若干次，所以结果存在缓存里：恢复、几个进程、再来一次都不必再量。
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ..cache import build_once, cache_dir
from ..config.model_sections import InitConfig, InitialLayers, ModelConfig
from ..config.width_sections import WIDTHS
from ..data.corpus import cache_key
from ..errors import DistillabError
from ..export.convert import evenly_spaced_layers, from_hf, student_from_teacher
from ..models.hf_layout import config_from_hf
from ..models.importance import block_influence, greedy_removal, most_influential
from ..models.interface import PretrainedLM
from ..models.pruning import WidthScores, most_active, narrowed, width_scores
from ..models.student import StudentModel
from ..models.tokenizer import tokenizer_fingerprint
from .splits import Sample, Splits

logger = logging.getLogger("distillab")

INFLUENCE_TOKENS, GREEDY_TOKENS = 8192, 1024
"""量层用的 token 数：再少，名次相邻的几层会随抽到的文字换来换去；贪心的要前向几百次。"""
_FORMAT = 1
_FILE, _WIDTH_FILE = "layers.json", "widths.safetensors"


def initial_student(
    init: InitConfig,
    config: ModelConfig | None,
    source: PretrainedLM,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits | None,
    recorded: InitialLayers | None,
) -> tuple[StudentModel, InitialLayers]:
    """float32 的学生，与它的各层从 ``source`` 的哪里来；``recorded`` 是这次运行从前选定的。

    要量而没有训练数据（``splits``），层数或层号超出 ``source`` 的，是 ``DistillabError``。
    """
    own = config_from_hf(source.model.config)
    keep = init.layers or (config or own).num_layers
    widths = init.widths(own)
    longest = min((config or source).max_seq_len, source.max_seq_len)

    def sample(tokens: int) -> Sample | None:
        return None if splits is None else splits.sample(tokenizer, longest, tokens)

    if recorded is not None and recorded.answers(init, keep):
        chosen = recorded
    else:
        with torch.random.fork_rng(devices=[]):  # 缓存里有没有，后面的随机数都相同
            tokens = GREEDY_TOKENS if init.choose == "greedy" else INFLUENCE_TOKENS
            chosen = _choose(init, keep, own.num_layers, source, tokenizer, sample(tokens))
    if config is not None and init.narrows:  # 各层抄进来时还是原来的宽度
        same = ["head_dim"] if config.head_width == own.head_width else []
        wide = {name: getattr(own, name) for name in init.given + same}
        config = config.model_copy(update=wide)
    student = student_from_teacher(source, chosen.layers, config)
    if init.narrows:
        kept = chosen.kept
        if kept is None:
            with torch.random.fork_rng(devices=[]):
                scores = _measured_widths(student, tokenizer, sample(INFLUENCE_TOKENS))
            kept = most_active(scores, student.config, widths)
            chosen = chosen.model_copy(update={"kept": kept})
        student = narrowed(student, kept)
    logger.info(chosen.line())
    return student, chosen


def _measured_widths(
    student: StudentModel, tokenizer: PreTrainedTokenizerBase, sample: Sample | None
) -> WidthScores:
    """``width_scores``，存在缓存里。"""
    if sample is None:
        raise DistillabError(
            f"student.init with {' or '.join(WIDTHS)} reads training data, and none was given to "
            f"build_models; expected its splits"
        )
    read = [tokenizer_fingerprint(tokenizer), *sample.key()]
    directory = cache_dir() / "widths" / cache_key([_FORMAT, weights_digest(student), *read])
    with build_once(directory) as building:
        if building is not None:
            save_file(width_scores(student, sample.rows())._asdict(), building / _WIDTH_FILE)
    return WidthScores(**load_file(directory / _WIDTH_FILE))


def _choose(
    init: InitConfig,
    keep: int,
    total: int,
    source: PretrainedLM,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample | None,
) -> InitialLayers:
    even = evenly_spaced_layers(total, keep)  # 层数越界在这里就是错误
    found: dict[str, Any] = {"source": init.source, "choose": init.choose, "total": total}
    if isinstance(init.choose, list):
        if init.choose[-1] >= total:
            raise DistillabError(
                f"student.init.choose lists layer {init.choose[-1]}, expected 0 to {total - 1}, "
                f"the layers of {init.source}"
            )
        return InitialLayers(**found, layers=init.choose)
    if init.choose == "even" or keep == total:
        return InitialLayers(**found, layers=even)
    if sample is None:
        raise DistillabError(
            f"student.init.choose={init.choose} reads training data, and none was given to "
            f"build_models; expected its splits, or choose: even"
        )
    measured = _measured(init.choose, keep, source, tokenizer, sample)
    if "scores" in measured:
        layers = most_influential(measured["scores"], keep)
    else:
        layers = sorted(set(range(total)) - set(measured["removed"]))
    return InitialLayers(**found, layers=layers, **measured)


def _measured(
    how: str, keep: int, source: PretrainedLM, tokenizer: PreTrainedTokenizerBase, sample: Sample
) -> dict[str, Any]:
    """``InitialLayers`` 里量出来的几项；同样的权重、数据与种子，只量一次。"""
    read = [tokenizer_fingerprint(tokenizer), *sample.key()]
    key = cache_key([_FORMAT, how, how == "greedy" and keep, weights_digest(source), *read])
    directory = cache_dir() / "layers" / key
    with build_once(directory) as building:
        if building is not None:
            rows = sample.rows()
            measured: dict[str, Any] = {"tokens": sum(map(len, rows))}
            if how == "greedy":
                logger.info(
                    f"removing layers one by one, each tried on {measured['tokens']:,} training "
                    f"tokens: this takes minutes, and is kept for the next time"
                )
                full = from_hf(source).to("cuda" if torch.cuda.is_available() else "cpu")
                measured["removed"], measured["losses"] = greedy_removal(full, rows, keep)
            else:
                measured["scores"] = block_influence(source, rows)
            (building / _FILE).write_text(json.dumps(measured))
    found: dict[str, Any] = json.loads((directory / _FILE).read_text())
    return found


def weights_digest(model: torch.nn.Module) -> str:
    """权重的 sha256，64 位十六进制：有一个数不同就不同，放在哪里无关。"""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(content)
    return digest.hexdigest()
