"""生成：策略、停止、流式输出、随机性与拒绝。"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from distillab.config.model_sections import ModelConfig
from distillab.errors import DistillabError
from distillab.export.convert import from_hf
from distillab.generate.generator import TextGenerator, padded
from distillab.generate.sampling import filter_top_k, filter_top_p
from distillab.generate.stops import until_stop
from distillab.models.interface import Head, PretrainedLM
from distillab.models.student import StudentModel

PROMPTS = ["The capital of France is", "知识蒸馏", "A"]
# 少数几个值反复出现，才会有并列。
ROWS = st.lists(
    st.lists(
        st.sampled_from([-30.0, -1.0, 0.0, 0.5, 2.0]) | st.floats(-20, 20, width=32),
        min_size=6,
        max_size=6,
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def student(tiny_config: ModelConfig) -> StudentModel:
    torch.manual_seed(0)
    model = StudentModel(tiny_config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def generator(student: StudentModel, tiny_tokenizer: PreTrainedTokenizerFast) -> TextGenerator:
    return TextGenerator(student, tiny_tokenizer)


class Scripted(nn.Module):
    """不看输入，第 t 步一定选中 ``script[row][t]``，其余 token 概率为零。"""

    max_seq_len, vocab_size, hidden_size = 64, 400, 400

    def __init__(self, *script: list[int]) -> None:
        super().__init__()
        self.script, self.head = script, Head(torch.eye(400))

    def new_cache(self) -> "ScriptedCache":
        return ScriptedCache(list(self.script))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: "ScriptedCache"
    ) -> torch.Tensor:
        hidden = torch.full((*input_ids.shape, 400), -1e4)
        for row, ids in enumerate(cache.rows):
            hidden[row, -1, ids[min(cache.step, len(ids) - 1)]] = 0.0
        cache.step += 1
        return hidden


class ScriptedCache:
    """记着还在的行；每次丢了几行也记下来。"""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.step = rows, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rows = [self.rows[index] for index in indices.tolist()]


@given(ROWS, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_top_k_keeps_the_same_tokens_as_transformers(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows)
    assert torch.equal(filter_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@given(ROWS, st.floats(0.01, 1.0) | st.sampled_from([0.25, 0.5, 0.75, 1.0]))
@example([[0.0] * 4], 0.75)  # 累计概率恰好等于 1 - p
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_the_same_tokens_as_transformers(rows: list[list[float]], p: float) -> None:
    logits = torch.tensor(rows)
    assert torch.equal(filter_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


def test_filters_accept_any_number_of_leading_dimensions() -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    for filtered in (filter_top_k(logits, 3), filter_top_p(logits, 0.5)):
        assert filtered.shape == logits.shape
    assert torch.equal(filter_top_p(logits, 0.5)[1, 2], filter_top_p(logits[1, 2], 0.5))


def hf_greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str], count: int
) -> list[list[int]]:
    left = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    output = model.generate(
        **left,
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, left.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("layout", ["tiny_qwen2", "tiny_llama"])
@pytest.mark.parametrize("wrap", [from_hf, PretrainedLM])
def test_greedy_equals_transformers_token_for_token_in_a_ragged_batch(
    layout: str,
    wrap: Callable[[nn.Module], nn.Module],
    tiny_tokenizer: PreTrainedTokenizerFast,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(layout)
    generator = TextGenerator(wrap(model), tiny_tokenizer)
    left = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    found = generator.generate_ids(left.input_ids, left.attention_mask, max_new_tokens=24)
    assert found.tolist() == hf_greedy(model, tiny_tokenizer, PROMPTS, 24)


def test_text_of_a_batch_equals_the_text_of_each_prompt_alone(generator: TextGenerator) -> None:
    together = generator.generate(PROMPTS, max_new_tokens=16)
    assert together == [generator.generate(p, max_new_tokens=16)[0] for p in PROMPTS]
    assert all(together)


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|im_end|>"])
def test_each_row_stops_at_its_own_end_token(
    stop: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    end = tiny_tokenizer.convert_tokens_to_ids(stop)
    a, b, c = tiny_tokenizer("abc")["input_ids"]
    model = Scripted([a, end, b, b], [a, b, c, end])
    generator = TextGenerator(model, tiny_tokenizer)
    ids = generator.generate_ids(torch.zeros(2, 3, dtype=torch.long), max_new_tokens=10)
    pad = tiny_tokenizer.pad_token_id
    assert ids.tolist() == [[a, end, pad, pad], [a, b, c, end]]
    assert generator.generate(["x", "y"], max_new_tokens=10) == ["a", "abc"]


def test_rows_that_ended_are_no_longer_computed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    end, pad = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), tiny_tokenizer.pad_token_id
    lengths = [3, 9, 1, 6, 9, 2, 5, 4, 12, 1]
    script = [[*range(10 * row, 10 * row + n - 1), end] for row, n in enumerate(lengths)]
    model, widths = Scripted(*script), []
    forward = model.forward
    model.forward = lambda ids, *rest: widths.append(len(ids)) or forward(ids, *rest)
    generator = TextGenerator(model, tiny_tokenizer)
    found = generator.generate_ids(torch.zeros(10, 3, dtype=torch.long), max_new_tokens=20)
    assert found.tolist() == [ids + [pad] * (12 - len(ids)) for ids in script]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 1
    assert sum(widths) < 0.75 * 10 * 12  # 各行实际只要 52


@pytest.fixture(params=["student", "pretrained"])
def stopping(
    request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast
) -> TextGenerator:
    """float64，舍入不会换掉一个 token；词表的十六分之一都算停止，行数因而很快变少。"""
    if request.param == "student":
        model = request.getfixturevalue("student").double()
    else:
        model = PretrainedLM(request.getfixturevalue("tiny_llama").double())
    generator = TextGenerator(model, tiny_tokenizer)
    generator.stop_ids = frozenset(range(0, 400, 16))
    return generator


def ragged(generator: TextGenerator, count: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(400, (3 + 2 * n,), generator=draw).tolist() for n in range(count)]


@pytest.mark.parametrize("strategy", ["greedy", "top_k", "top_p", "sample"])
def test_a_row_is_the_same_alone_and_whoever_shares_its_batch(
    stopping: TextGenerator, strategy: str
) -> None:
    prompts = ragged(stopping)
    room = stopping.model.max_seq_len - max(map(len, prompts))
    options = {"strategy": strategy, "max_new_tokens": room, "temperature": 2.0}

    def rows(chosen: list[int]) -> list[list[int]]:
        ids, mask = padded([prompts[n] for n in chosen], 0, torch.device("cpu"))
        seeds = [100 + n for n in chosen]
        found = stopping.generate_ids(ids, mask, seeds=seeds, **options)
        return [until_stop(row, stopping.stop_ids) for row in found.tolist()]

    together = rows(list(range(12)))
    assert together == [rows([n])[0] for n in range(12)]
    assert rows([7, 2, 5]) == [together[n] for n in (7, 2, 5)]
    assert len({len(row) for row in together}) > 3  # 有先有后，中途确实丢了行


@pytest.mark.parametrize("layout", ["tiny_qwen2", "tiny_llama"])
def test_greedy_equals_transformers_while_rows_drop_out(
    layout: str, tiny_tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(layout)
    stops = list(range(0, 400, 9))
    for wrap in (from_hf, PretrainedLM):
        generator = TextGenerator(wrap(model), tiny_tokenizer)
        generator.stop_ids = frozenset(stops)
        ids, mask = padded(ragged(generator), generator.pad_id, torch.device("cpu"))
        expected = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=30,
            eos_token_id=stops, pad_token_id=generator.pad_id,
        )[:, ids.shape[1] :]  # fmt: skip
        found = generator.generate_ids(ids, mask, max_new_tokens=30)
        assert found.tolist() == expected.tolist()


def test_left_padding_keeps_the_last_column_real_and_equal_rows_need_no_mask() -> None:
    ids, mask = padded([[5], [6, 7, 8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask is not None
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    ids, mask = padded([[5, 6], [7, 8]], 9, torch.device("cpu"))
    assert (ids.tolist(), mask) == ([[5, 6], [7, 8]], None)


def test_a_response_ends_with_its_first_stop_token() -> None:
    assert until_stop([1, 2, 3, 2], {2}) == [1, 2]
    assert until_stop([1, 3], {2}) == [1, 3]


def test_im_start_does_not_stop_generation(generator: TextGenerator) -> None:
    names = generator.tokenizer.convert_ids_to_tokens(sorted(generator.stop_ids))
    assert names == ["<|endoftext|>", "<|im_end|>"]


def test_generation_ends_at_max_seq_len(generator: TextGenerator) -> None:
    ids = generator.generate_ids(torch.ones(1, 60, dtype=torch.long), max_new_tokens=50)
    assert ids.shape[1] <= 4


def test_padding_rows_of_the_head_are_never_chosen(
    tiny_config: ModelConfig, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = StudentModel(tiny_config.model_copy(update={"vocab_size": 512}))
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.embedding.weight[400:] *= 100  # 填充行的 logit 远大于其他
    generator = TextGenerator(model, tiny_tokenizer)
    for strategy in ("greedy", "sample"):
        ids = generator.generate_ids(
            torch.ones(4, 3, dtype=torch.long), strategy=strategy, max_new_tokens=20, seeds=range(4)
        )
        assert int(ids.max()) < 400


@pytest.mark.parametrize("strategy", ["top_k", "top_p", "sample"])
def test_sampling_repeats_with_a_seed_and_differs_without(
    generator: TextGenerator, strategy: str
) -> None:
    def text(seed: int | None) -> list[str]:
        return generator.generate(
            PROMPTS, strategy=strategy, max_new_tokens=16, temperature=2.0, seed=seed
        )

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


@pytest.mark.parametrize("seed", [0, None])
def test_sampling_leaves_the_global_random_state_alone(
    generator: TextGenerator, seed: int | None
) -> None:
    before = torch.get_rng_state()
    generator.generate("A", strategy="sample", max_new_tokens=8, seed=seed)
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(generator: TextGenerator) -> None:
    greedy = generator.generate(PROMPTS, max_new_tokens=12)
    options = {"max_new_tokens": 12, "seed": 0}
    assert generator.generate(PROMPTS, strategy="top_k", top_k=1, **options) == greedy
    assert generator.generate(PROMPTS, strategy="top_p", top_p=1e-6, **options) == greedy
    assert generator.generate(PROMPTS, strategy="sample", temperature=1e-4, **options) == greedy


def test_sampled_frequencies_follow_the_tempered_filtered_distribution(
    generator: TextGenerator,
) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        logits = generator.model.logits(generator.model(ids)[0, -1])
    expected = torch.zeros(400)
    top = (logits / 3.0).topk(5)
    expected[top.indices] = top.values.softmax(-1)
    draws = generator.generate_ids(
        ids.expand(4000, -1), strategy="top_k", top_k=5, temperature=3.0, max_new_tokens=1,
        seeds=range(4000),
    )  # fmt: skip
    found = torch.bincount(draws.flatten(), minlength=400) / 4000
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_streamed_pieces_never_split_a_character_and_join_to_the_result(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "温度é🎓 越高 ok"
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) > len(text), "the test needs characters split over tokens"
    model = Scripted([*ids, tiny_tokenizer.eos_token_id])
    pieces: list[str] = []
    result = TextGenerator(model, tiny_tokenizer).generate("x", stream=pieces.append)
    assert result == [text]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_character_cut_off_by_the_limit_is_still_streamed(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tiny_tokenizer("🎓")["input_ids"]
    assert len(ids) > 2
    generator, pieces = TextGenerator(Scripted(ids), tiny_tokenizer), []
    result = generator.generate("x", max_new_tokens=2, stream=pieces.append)
    assert "".join(pieces) == result[0] != ""


def test_empty_prompt_starts_from_endoftext(generator: TextGenerator) -> None:
    assert generator.generate("", max_new_tokens=8) == generator.generate(
        "<|endoftext|>", max_new_tokens=8
    )


def test_modes_of_every_module_are_restored(generator: TextGenerator) -> None:
    model = generator.model.train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    generator.generate("A", max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop here"):
        generator.generate("A", max_new_tokens=2, stream=lambda _: _raise())
    assert [module.training for module in model.modules()] == before


def _raise() -> None:
    raise RuntimeError("stop here")


def test_dropout_and_gradients_are_off_while_generating(
    tiny_config: ModelConfig, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = StudentModel(tiny_config.model_copy(update={"dropout": 0.5})).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    generator = TextGenerator(model, tiny_tokenizer)
    ids = torch.ones(1, 4, dtype=torch.long)
    first, second = (generator.generate_ids(ids, max_new_tokens=12) for _ in range(2))
    assert torch.equal(first, second)
    # 生成的 token 要能喂回训练中的前向。
    model.logits(model(first)).sum().backward()
    assert model.embedding.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "topk"}, "strategy is 'topk', did you mean 'top_k'"),
        ({"temperature": 0.0}, "temperature=0.0, expected above 0"),
        ({"temperature": float("nan")}, "temperature=nan, expected above 0"),
        ({"top_k": 0}, "top_k=0, expected at least 1"),
        ({"top_p": 0.0}, "top_p=0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5, expected above 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, expected at least 1"),
    ],
)
def test_option_out_of_range_is_refused(
    generator: TextGenerator, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DistillabError, match=message):
        generator.generate("A", **options)


def test_no_prompts_are_refused(generator: TextGenerator) -> None:
    with pytest.raises(DistillabError, match="prompts is empty"):
        generator.generate([])


def test_streaming_a_batch_is_refused(generator: TextGenerator) -> None:
    with pytest.raises(DistillabError, match="exactly one prompt, found 2"):
        generator.generate(["A", "B"], stream=print)


def test_prompt_that_fills_the_context_is_refused(generator: TextGenerator) -> None:
    with pytest.raises(DistillabError, match="64 tokens, expected fewer than max_seq_len=64"):
        generator.generate_ids(torch.ones(1, 64, dtype=torch.long))


def test_empty_prompt_without_any_start_token_is_refused(
    student: StudentModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    generator = TextGenerator(student, bare)
    generator._start_id = None
    with pytest.raises(DistillabError, match="prompt is empty"):
        generator.generate("")
