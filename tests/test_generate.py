"""生成：策略、停止、流式输出、随机性与拒绝。"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from distillab.config import ModelConfig
from distillab.convert import from_hf
from distillab.errors import DistillabError
from distillab.generate import TextGenerator, filter_top_k, filter_top_p
from distillab.language_model import Head, PretrainedLM
from distillab.model import StudentModel

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

    def new_cache(self) -> list[int]:
        return []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: list[int]
    ) -> torch.Tensor:
        step = len(cache)
        cache.append(step)
        hidden = torch.full((*input_ids.shape, 400), -1e4)
        for row, ids in enumerate(self.script):
            hidden[row, -1, ids[min(step, len(ids) - 1)]] = 0.0
        return hidden


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
            torch.ones(4, 3, dtype=torch.long), strategy=strategy, max_new_tokens=20, seed=0
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
        ids.expand(4000, -1), strategy="top_k", top_k=5, temperature=3.0, max_new_tokens=1, seed=0
    )
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
