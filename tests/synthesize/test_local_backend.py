"""本地教师：一个回答不取决于与谁同批、分几批。"""

import math

import pytest
import torch

from distillab.config.sections import SamplingConfig
from distillab.data.pairs import Task
from distillab.errors import DistillabError
from distillab.generate.generator import TextGenerator
from distillab.generate.sampling import filter_top_k, filter_top_p, sample_tokens
from distillab.models.interface import PretrainedLM
from distillab.synthesize.local_backend import LocalBackend
from distillab.synthesize.questions import TOO_LONG, Question
from distillab.synthesize.synthesize import question_seed


@pytest.fixture
def model(tiny_qwen2):
    with torch.no_grad():
        tiny_qwen2.get_input_embeddings().weight[399] *= 3  # <|im_end|> 时常最大，有的回答会停下
    return PretrainedLM(tiny_qwen2.double()).eval()  # float64：舍入不会换掉一个 token


WORDS = [
    "the teacher",
    "中国",
    "a",
    "知识蒸馏让小模型学习",
    "Paris is the capital of France, of course",
]


@pytest.fixture
def questions():
    tasks = [
        Task(f"t{n}", [{"role": "user", "content": text}], None, {}) for n, text in enumerate(WORDS)
    ]
    return [
        Question(task, sample, question_seed(5, task.id, sample))
        for task in tasks
        for sample in range(2)
    ]


@pytest.fixture
def backend(model, tiny_tokenizer):
    def prompt(task):
        return tiny_tokenizer.apply_chat_template(
            task.messages, add_generation_prompt=True, return_dict=False
        )

    def backend(batch_size=4, temperature=0.0, max_new_tokens=12, **options):
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens, **options)
        return LocalBackend(
            TextGenerator(model, tiny_tokenizer), prompt, sampling, batch_size, name="tiny"
        )

    return backend


def answers(backend, questions):
    batches = list(backend.answer(questions, lambda: False))
    return {(a.question.task.id, a.question.sample): a for batch in batches for a in batch}


def by_hand(model, tokenizer, question, sampling):
    """不分批、没有 cache、一步一步照定义来。"""
    ids = tokenizer.apply_chat_template(
        question.task.messages, add_generation_prompt=True, return_dict=False
    )
    uniform = torch.rand(
        sampling.max_new_tokens, dtype=torch.float64,
        generator=torch.Generator().manual_seed(question.seed),
    )  # fmt: skip
    new = []
    for u in uniform[: 64 - len(ids)].tolist():
        logits = model.logits(model(torch.tensor([ids + new]))[:, -1])
        if sampling.temperature:
            logits = logits / sampling.temperature
            if sampling.top_k:
                logits = filter_top_k(logits, sampling.top_k)
            if sampling.top_p:
                logits = filter_top_p(logits, sampling.top_p)
            probabilities = logits.double().softmax(-1)[0].tolist()
            total, token = 0.0, -1
            while total <= u:
                token += 1
                total += probabilities[token]
        else:
            token = int(logits.argmax())
        new.append(token)
        if token in (397, 399):  # <|endoftext|>、<|im_end|>
            return tokenizer.decode(new[:-1], skip_special_tokens=True), "stop", len(new)
    return tokenizer.decode(new, skip_special_tokens=True), "length", len(new)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20}, {"temperature": 1.5, "top_p": 0.7}],

)  # fmt: skip
@torch.no_grad()
def test_answers_are_those_of_the_definition(model, tiny_tokenizer, backend, questions, options):
    local = backend(max_new_tokens=20, **options)
    found = answers(local, questions)
    sampling = SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 20, **options})
    for question in questions:
        answer = found[question.task.id, question.sample]
        expected = by_hand(model, tiny_tokenizer, question, sampling)
        assert (answer.response, answer.finish_reason, answer.tokens) == expected
        assert answer.model == "tiny"
        assert answer.seed == (question.seed if options else None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_new_tokens", [8, 45])  # 45：多数提示没有这么多余地
def test_an_answer_does_not_depend_on_its_batch(backend, questions, temperature, max_new_tokens):
    options = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    together = answers(backend(16, **options), questions)
    assert together == answers(backend(1, **options), questions)
    assert together == answers(backend(3, **options), questions[::-1])
    assert together.items() >= answers(backend(5, **options), questions[3:8]).items()
    responses = {key: answer.response for key, answer in together.items()}
    assert (responses["t0", 0] == responses["t0", 1]) is (temperature == 0)


def test_some_answers_stop_and_others_are_cut_off(backend, questions):
    found = answers(backend(temperature=1.0, max_new_tokens=20), questions).values()
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert all((a.tokens == 20) >= (a.finish_reason == "length") for a in found)
    assert not any("<|im_end|>" in answer.response for answer in found)


def test_longest_prompts_come_first_and_batches_are_full(backend, questions):
    batches = list(backend(batch_size=6).answer(questions, lambda: False))
    assert [len(batch) for batch in batches] == [6, 4]
    lengths = [len(WORDS[int(a.question.task.id[1:])].encode()) for batch in batches for a in batch]
    assert lengths[0] == max(lengths)
    assert lengths[-1] == min(lengths)


def test_prompt_beyond_the_context_is_reported_and_the_others_are_answered(backend, questions):
    long = Task("long", [{"role": "user", "content": "龘" * 30}], None, {})
    found = answers(backend(), [Question(long, 0, 1), *questions])
    refused = found.pop(("long", 0))
    assert (refused.response, refused.finish_reason, refused.tokens) == ("", TOO_LONG, 0)
    assert refused.error.startswith("the prompt has ")
    assert refused.error.endswith("expected fewer than the context of 64")
    assert found == answers(backend(), questions)


@pytest.mark.parametrize(("length", "reason", "tokens"), [(64, TOO_LONG, 0), (63, "length", 1)])
def test_one_free_place_in_the_context_is_enough(model, tiny_tokenizer, length, reason, tokens):
    local = LocalBackend(
        TextGenerator(model, tiny_tokenizer),
        lambda _: [5] * length,
        SamplingConfig(temperature=0),
        batch_size=1,
        name="tiny",
    )
    ((answer,),) = local.answer([Question(Task("t", [], None, {}), 0, 0)], lambda: False)
    assert (answer.finish_reason, answer.tokens) == (reason, tokens)


def test_stop_token_that_is_ordinary_text_is_left_out_of_the_answer(backend, questions):
    local = backend(temperature=1.0)
    local.generator.stop_ids = frozenset(range(200, 400))
    found = answers(local, questions).values()
    assert any(answer.tokens == 1 for answer in found)
    assert all(answer.response == "" for answer in found if answer.tokens == 1)


def test_stopping_ends_after_the_current_batch(backend, questions):
    stopped = iter([False, False, True])
    batches = list(backend(batch_size=2).answer(questions, lambda: next(stopped)))
    assert [len(batch) for batch in batches] == [2, 2]


def test_running_out_of_memory_names_the_key_to_lower(backend, questions, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    local = backend(batch_size=6)
    monkeypatch.setattr(local.generator, "generate_ids", exhausted)
    with pytest.raises(DistillabError, match=r"lower synthesize\.batch_size=6") as caught:
        answers(local, questions)
    assert "\n" not in str(caught.value)


def test_sampled_tokens_have_their_probabilities():
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = sample_tokens(logits.expand(count, -1), uniform).bincount(minlength=5) / count
    torch.testing.assert_close(found, logits.softmax(-1)[0], atol=1 / count, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_removed_tokens_are_not_sampled_at_the_ends(uniform):
    logits = torch.full((1, 150_000), -torch.inf)
    logits[0, 7:9] = 0.0
    assert sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64)).item() in (7, 8)
