"""许多提示各得一个回答：on-policy 采样、教师合成、考试与 lm-evaluation-harness 都由这里生成。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..config.sections import SamplingConfig
from ..errors import DistillabError
from .generator import TextGenerator, padded
from .sampling import sampling_options
from .stops import StopTexts, until_stop


def respond(
    generator: TextGenerator,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    rooms: Sequence[int] | None = None,
    batch_size: int | None = None,
    until: Sequence[str] = (),
    lower: str | None = None,
) -> Iterator[dict[int, list[int]]]:
    """一批一批地给出 ``{第几条提示: 它的回答，到停止 token（含）为止}``。

    一个回答只取决于它的提示与种子（浮点舍入除外：填充与批的大小会改变求和的次序，几乎并列的两个
    token 可能选另一个）。补齐到别人的长度会让余地不足 ``max_new_tokens`` 的更早停下，所以它们只与
    等长、余地也相同的同批。

    * ``rooms``：各条至多写几个 token，都大于 0；缺省为模型的上下文余下的。
    * ``batch_size``：一批几条，由长到短，显存不够的话第一批就知道；``None`` 不分也不排。
    * ``until``：写出其中一段文字也停下，回答里含着它。
    * ``lower``：显存不够时叫人改小的；``None`` 则原样抛出。
    """
    model, most = generator.model, sampling.max_new_tokens
    rooms = rooms or [model.max_seq_len - len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]) if batch_size else 0)
    together: dict[tuple[int, int] | None, list[int]] = {}
    for row in order:
        alike = (rooms[row], len(prompts[row])) if rooms[row] < most else None
        together.setdefault(alike, []).append(row)
    for alike, members in together.items():
        size = batch_size or len(members)
        for rows in (members[start : start + size] for start in range(0, len(members), size)):
            ids, mask = padded(
                [prompts[row] for row in rows], generator.pad_id, model.head.weight.device
            )
            ends = StopTexts(until, generator.stop_ids, generator.decode, len(rows))
            try:
                new_ids = generator.generate_ids(
                    ids,
                    mask,
                    max_new_tokens=alike[0] if alike else most,
                    seeds=[seeds[row] for row in rows],
                    on_token=ends if until else None,
                    **sampling_options(sampling),
                )
            except torch.OutOfMemoryError as error:
                if lower is None:
                    raise
                raise DistillabError(
                    f"out of memory with {len(rows)} prompts of up to {ids.shape[1]} tokens at "
                    f"once: lower {lower}"
                ) from error
            found = ends.rows if until else new_ids.tolist()
            yield {
                row: until_stop(ids, generator.stop_ids)
                for row, ids in zip(rows, found, strict=True)
            }
