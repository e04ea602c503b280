"""训练中从当前学生采样的 response（on-policy），以及盯着它们的指标。

采样不留痕迹：不建计算图，每行用自己的种子，dropout 与 train/eval 状态在采样之后还原。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..batch import Example, Tokens
from ..config.sections import ResponsesConfig, SamplingConfig
from ..data.sides import Sides, response_segments, translated, translated_example
from ..errors import DistillabError
from ..generate.batching import sampling_groups
from ..generate.generator import TextGenerator
from ..generate.respond import respond
from ..models.interface import LanguageModel

REPEATED_NGRAM = 4
"""一条 response 里重复出现的 4-gram 的份额，就是它的重复程度。"""


class RolloutSums(NamedTuple):
    """对 response 求和的量；跨批次、跨进程直接相加。

    Attributes:
        responses: 条数。
        tokens: token 数，停止 token 在内。
        truncated: 没有停下来、因长度而止的条数。
        empty: 一上来就停的条数。
        repetition: 各条的重复程度之和，每条在 ``[0, 1]``。
    """

    responses: float = 0.0
    tokens: float = 0.0
    truncated: float = 0.0
    empty: float = 0.0
    repetition: float = 0.0


@dataclass
class Rollout:
    """给一批 ``Example`` 换上学生自己的 response。

    Attributes:
        generator: 当前的学生与它的 tokenizer；权重随训练而变，每次都用最新的。
        sampling: 温度、过滤与最长的长度。
        teacher_max_seq_len: 教师的上限；``None`` 为没有教师。
        sides: 教师用自己的分词器时的两个分词器；采样的文字译给它读。
    """

    generator: TextGenerator
    sampling: SamplingConfig
    teacher_max_seq_len: int | None = None
    sides: Sides | None = None

    def of(self, model: LanguageModel) -> Rollout:
        """同样的采样，换一个模型：分片的学生要先收齐成一份拷贝。"""
        own = self.generator
        if model is own.model:
            return self
        return replace(self, generator=TextGenerator(model, own.tokenizer, own.vocabulary))

    def groups(self, examples: Sequence[Example]) -> list[list[int]]:
        """哪几条一起采样。"""
        lengths = [len(example.student.prompt) for example in examples]
        return sampling_groups(self.generator.model, lengths, self.sampling.max_new_tokens)

    def sample(
        self, examples: Sequence[Example], seeds: Sequence[int]
    ) -> tuple[list[Example], RolloutSums]:
        """从最后一段 response 的 prompt 开始采样，每条一个回答。

        Args:
            examples: 只用它们的 prompt。
            seeds: 每条的种子。

        Returns:
            ``(换了 response 的 Example, RolloutSums)``；两个视角的 response 相同。

        Raises:
            DistillabError: prompt 占满了学生或教师的上下文。
        """
        responses: dict[int, list[int]] = {}
        for batch in respond(
            self.generator,
            [example.student.prompt for example in examples],
            self.sampling,
            seeds,
            rooms=[self._room(example) for example in examples],
        ):
            responses |= batch
        stops = self.generator.stop_ids
        sampled = [self._sampled(example, responses[row]) for row, example in enumerate(examples)]
        sums = RolloutSums(
            responses=len(responses),
            tokens=sum(map(len, responses.values())),
            truncated=sum(response[-1] not in stops for response in responses.values()),
            empty=sum(
                len(response) == 1 and response[0] in stops for response in responses.values()
            ),
            repetition=sum(map(repetition, responses.values())),
        )
        return sampled, sums

    def _sampled(self, example: Example, response: list[int]) -> Example:
        prompts = example.student.prompt, example.teacher.prompt
        if self.sides is None:
            return _with_response(example, *prompts, response)
        limit = self.teacher_max_seq_len or len(prompts[1])  # 没有教师就没有人读
        return translated_example(_tokens(prompts[0], response), prompts[1], self.sides, limit)

    def _room(self, example: Example) -> int:
        """还写得下几个 token。"""
        prompt, teacher_prompt = len(example.student.prompt), len(example.teacher.prompt)
        room = self.generator.model.max_seq_len - prompt
        if room < 1:
            raise DistillabError(
                f"a prompt has {prompt} tokens, expected fewer than the student's longest "
                f"sequence {self.generator.model.max_seq_len}: lower data.max_seq_len"
            )
        if self.teacher_max_seq_len is not None:
            if teacher_prompt >= self.teacher_max_seq_len:
                raise DistillabError(
                    f"a teacher prompt has {teacher_prompt} tokens, expected fewer than its "
                    f"longest sequence {self.teacher_max_seq_len}: shorten the experience or lower "
                    f"data.max_seq_len"
                )
            if self.sides is None:  # 否则译成教师的有几个 token，写出来才知道
                room = min(room, self.teacher_max_seq_len - teacher_prompt)
        return room


def answered(
    examples: Sequence[Example],
    teacher: TextGenerator,
    max_new_tokens: int,
    sides: Sides | None = None,
    student_max_seq_len: int = 0,
) -> list[Example]:
    """没有 response 的 ``Example``，由教师读着自己的视角贪心地回答；有的不变。

    Args:
        examples: 一批。
        teacher: 教师与它的 tokenizer。
        max_new_tokens: 最长的 response。
        sides: 教师用自己的分词器时的两个分词器。
        student_max_seq_len: 译成学生的 token 之后，一条至多这么长；``sides`` 为 ``None`` 时不看。
    """
    asked = [example for example in examples if not example.student.response]
    if not asked:
        return list(examples)
    rollout = Rollout(
        teacher,
        SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens),
        teacher.model.max_seq_len,
    )
    views = [Example(example.teacher, example.teacher) for example in asked]
    answers = iter(rollout.sample(views, [0] * len(views))[0])

    def with_answer(example: Example, answer: Tokens) -> Example:
        if sides is None:
            prompts = example.student.ids, example.teacher.ids
            return _with_response(example, *prompts, answer.labels)
        own = translated(answer.labels, sides.teacher, sides.student)
        room = student_max_seq_len - len(example.student.ids)
        student = _tokens(example.student.ids, own[: max(room, 0)])
        return Example(student, answer, response_segments(student, answer))

    return [
        example if example.student.response else with_answer(example, next(answers).student)
        for example in examples
    ]


def _with_response(
    example: Example, prompt: list[int], teacher_prompt: list[int], response: list[int]
) -> Example:
    student = _tokens(prompt, response)
    same = example.teacher is example.student
    return Example(student, student if same else _tokens(teacher_prompt, response))


def _tokens(prompt: list[int], response: list[int]) -> Tokens:
    return Tokens(prompt + response, list(range(len(prompt), len(prompt) + len(response))))


def student_fraction(config: ResponsesConfig, step: int, total_steps: int) -> float:
    """第 ``step`` 步（从 0 起）从学生采样的概率：不变，或线性变到 ``final_student_fraction``。"""
    if config.final_student_fraction is None:
        return config.student_fraction
    done = step / max(total_steps - 1, 1)
    start, end = config.student_fraction, config.final_student_fraction
    return start + (end - start) * min(done, 1.0)


def repetition(ids: list[int]) -> float:
    """重复出现的 4-gram 的份额，``[0, 1]``；陷入循环的回答接近 1。"""
    grams = [tuple(ids[i : i + REPEATED_NGRAM]) for i in range(len(ids) - REPEATED_NGRAM + 1)]
    if not grams:
        return 0.0
    return 1 - len(Counter(grams)) / len(grams)
