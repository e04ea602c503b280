"""学生模型自身的性质；与 transformers 的逐数对照在 ``parity/``。"""

from typing import Any

import pytest
import torch
from torch import nn

from distillab.config.model_sections import ModelConfig
from distillab.errors import DistillabError
from distillab.models.blocks import GQAAttention, RMSNorm, apply_rotary, rotary_tables
from distillab.models.interface import Head, PretrainedLM
from distillab.models.student import StudentModel
from distillab.vocabulary import Vocabulary


@pytest.fixture
def student(tiny_config: ModelConfig) -> StudentModel:
    torch.manual_seed(0)
    model = StudentModel(tiny_config)
    for parameter in model.parameters():  # 初始的偏置是 0，太规整
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(1))


def test_default_config_has_exactly_123_426_304_parameters() -> None:
    with torch.device("meta"):
        model = StudentModel(ModelConfig())
    attention = (512 * 512 + 512) + 2 * (512 * 128 + 128) + 512 * 512  # q, k 与 v, o
    ffn = 3 * 512 * 2048
    norms = 2 * 512
    assert (attention, ffn, norms) == (656_128, 3_145_728, 1_024)
    expected = 151_936 * 512 + 12 * (attention + ffn + norms) + 512
    assert model.num_parameters() == expected == 123_426_304


def test_head_is_the_same_parameter_as_the_embedding(student: StudentModel) -> None:
    assert student.lm_head.weight is student.embedding.weight
    assert student.head.weight is student.embedding.weight
    names = [name for name, _ in student.named_parameters()]
    assert "lm_head.weight" not in names


def test_initial_weights_have_std_0_02_zero_biases_and_unit_norms() -> None:
    torch.manual_seed(0)
    model = StudentModel(ModelConfig(num_layers=1, vocab_size=1000))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name


def test_forward_returns_normalized_hidden_states_without_applying_the_head(
    student: StudentModel, tiny_config: ModelConfig
) -> None:
    nn.init.ones_(student.norm.weight)
    hidden = student(tokens(2, 7))
    assert hidden.shape == (2, 7, tiny_config.hidden_size)
    torch.testing.assert_close(hidden.pow(2).mean(-1), torch.ones(2, 7), atol=1e-4, rtol=0)
    assert student.logits(hidden).shape == (2, 7, tiny_config.vocab_size)


def test_a_later_token_does_not_change_earlier_hidden_states(student: StudentModel) -> None:
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 400
    before, after = student(ids), student(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


def test_rotated_inner_products_depend_on_relative_position_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(m: int, n: int) -> float:
        rotated = [
            apply_rotary(x, *rotary_tables(torch.tensor([[position]]), 8, 1e4))
            for x, position in ((query, m), (key, n))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(5, 2) == pytest.approx(score(33, 30), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


def test_rotary_pairs_the_first_half_with_the_second() -> None:
    unit = torch.zeros(1, 1, 1, 8)
    unit[..., 0] = 1.0
    rotated = apply_rotary(unit, *rotary_tables(torch.tensor([[1]]), 8, 1e4))
    expected = torch.zeros(8)
    expected[0], expected[4] = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
    torch.testing.assert_close(rotated.flatten(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_squares_in_float32(dtype: torch.dtype) -> None:
    hidden = torch.full((1, 8), 300.0, dtype=dtype)  # 300^2 在 fp16 里是 inf
    normalized = RMSNorm(8).to(dtype)(hidden)
    assert normalized.dtype == dtype
    torch.testing.assert_close(normalized.float(), torch.ones(1, 8), atol=1e-2, rtol=0)


def test_grouped_heads_equal_multi_head_attention_with_repeated_kv_weights() -> None:
    torch.manual_seed(0)
    grouped, full = GQAAttention(32, 4, 2), GQAAttention(32, 4, 4)
    full.q_proj, full.o_proj = grouped.q_proj, grouped.o_proj
    for name in ("k_proj", "v_proj"):
        source, target = getattr(grouped, name), getattr(full, name)
        heads = source.weight.detach().view(2, 8, 32)[[0, 0, 1, 1]]
        target.weight = nn.Parameter(heads.reshape(32, 32))
        target.bias = nn.Parameter(source.bias.detach().view(2, 8)[[0, 0, 1, 1]].flatten())
    hidden = torch.randn(2, 5, 32)
    cos, sin = rotary_tables(torch.arange(5)[None], 8, 1e4)
    torch.testing.assert_close(
        grouped(hidden, cos, sin), full(hidden, cos, sin), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_result_as_none(
    student: StudentModel, side: str
) -> None:
    ids = tokens(1, 9)
    plain = student(ids)
    padding, zeros = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    ones = torch.ones_like(ids)
    parts = (padding, ids), (zeros, ones)
    padded, mask = (torch.cat(p if side == "left" else p[::-1], dim=1) for p in parts)
    hidden = student(padded, mask)
    assert not hidden.isnan().any()
    real = hidden[:, 4:] if side == "left" else hidden[:, :9]
    torch.testing.assert_close(real, plain, atol=1e-5, rtol=0)


def test_padding_in_the_middle_does_not_shift_positions(student: StudentModel) -> None:
    ids = tokens(1, 9)
    gap = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((ids[:, :5], gap, ids[:, 5:]), 1)
    mask = torch.cat((torch.ones(1, 5), gap, torch.ones(1, 4)), 1).long()
    plain, cache = student(ids), student.new_cache()
    torch.testing.assert_close(student(padded, mask)[mask.bool()][None], plain, atol=1e-5, rtol=0)
    student(padded[:, :9], mask[:, :9], cache)  # 右填充的提示，之后接着生成
    torch.testing.assert_close(student(padded[:, 9:], mask, cache), plain[:, 5:], atol=1e-5, rtol=0)


def test_every_query_sees_some_key_so_that_no_kernel_can_give_nan(
    student: StudentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, attend = [], nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs["attn_mask"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    student(tokens(2, 5), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]))
    assert len(masks) == student.config.num_layers
    assert all(mask.any(-1).all() for mask in masks)


def test_unpadded_input_takes_the_causal_fast_path(
    student: StudentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attend = [], nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"], kwargs["is_causal"], kwargs["enable_gqa"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    student(tokens(2, 5))
    assert set(calls) == {(None, True, True)}


def test_gradients_through_left_padding_are_finite(student: StudentModel) -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    student(tokens(1, 5), mask)[mask.bool()].sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_all_ones_mask_equals_no_mask(student: StudentModel) -> None:
    ids = tokens(2, 9)
    torch.testing.assert_close(student(ids, torch.ones_like(ids)), student(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [8, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_cache_gives_the_same_hidden_states_as_one_pass(
    student: StudentModel, chunks: list[int], padded: bool
) -> None:
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = student(ids, mask if padded else None)
    cache, pieces, done = student.new_cache(), [], 0
    for size in chunks:
        done += size
        pieces.append(
            student(ids[:, done - size : done], mask[:, :done] if padded else None, cache)
        )
    assert cache.length == 9
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-5, rtol=0)


def test_activation_checkpointing_gives_identical_gradients_even_with_dropout(
    tiny_config: ModelConfig,
) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = StudentModel(tiny_config.model_copy(update={"dropout": 0.1})).train()
        if recompute:
            model.enable_activation_checkpointing()
        torch.manual_seed(1)
        model.logits(model(tokens(2, 9))).logsumexp(-1).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    for expected, found in zip(plain, recomputed, strict=True):
        assert torch.equal(expected, found)


def test_activation_checkpointing_keeps_fewer_tensors(tiny_config: ModelConfig) -> None:
    def saved_bytes(recompute: bool) -> int:
        model, total = StudentModel(tiny_config).train(), 0
        if recompute:
            model.enable_activation_checkpointing()

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(tokens(2, 32))
        return total

    assert saved_bytes(True) < saved_bytes(False) / 3


def test_dropout_acts_in_training_only(tiny_config: ModelConfig) -> None:
    model = StudentModel(tiny_config.model_copy(update={"dropout": 0.5}))
    ids = tokens(1, 8)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(student: StudentModel, dtype: torch.dtype) -> None:
    ids = tokens(1, 12)
    expected = student(ids)
    hidden = student.to(dtype)(ids)
    assert hidden.dtype == dtype
    assert student.logits(hidden).dtype == torch.float32
    assert (hidden.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_autocast_runs_with_padding_and_cache(student: StudentModel) -> None:
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = student(ids, mask)
    cache = student.new_cache()
    with torch.autocast("cpu", torch.bfloat16):
        first = student(ids[:, :4], mask[:, :4], cache)
        second = student(ids[:, 4:], mask, cache)
        assert student.logits(second).dtype == torch.float32
    found = torch.cat((first, second), 1).float()[mask.bool()]
    assert (found - expected[mask.bool()]).abs().mean() < 0.05 * expected.abs().mean()


def test_too_long_a_sequence_is_refused_with_both_lengths(student: StudentModel) -> None:
    with pytest.raises(DistillabError, match=r"65 tokens.*max_seq_len=64"):
        student(tokens(1, 65))
    cache = student.new_cache()
    student(tokens(1, 60), None, cache)
    with pytest.raises(DistillabError, match=r"65 tokens.*max_seq_len=64"):
        student(tokens(1, 5), None, cache)


def test_mask_that_does_not_cover_the_cache_is_refused(student: StudentModel) -> None:
    cache = student.new_cache()
    student(tokens(1, 4), None, cache)
    with pytest.raises(DistillabError, match=r"shape \[1, 1\], expected \[1, 5\]"):
        student(tokens(1, 1), torch.ones(1, 1), cache)


def test_head_applies_bias_then_scale_then_softcap() -> None:
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, -0.5])
    head = Head(weight, bias, scale=2.0, softcap=3.0)
    x = torch.tensor([2 * (1.0 + 0.5), 2 * (2.0 - 0.5)])
    torch.testing.assert_close(head.logits(torch.ones(2)), 3 * torch.tanh(x / 3))


def test_head_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 64), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = Head(weight).logits(hidden)
    torch.testing.assert_close(logits, hidden @ weight.T, atol=1e-5, rtol=0)


def test_cut_head_shares_storage_and_keeps_the_other_settings() -> None:
    head = Head(torch.randn(10, 4), torch.randn(10), scale=2.0, softcap=5.0)
    cut = head.cut(Vocabulary(6))
    assert cut.weight.data_ptr() == head.weight.data_ptr()
    hidden = torch.randn(3, 4)
    torch.testing.assert_close(cut.logits(hidden), head.logits(hidden)[:, :6])
    with pytest.raises(DistillabError, match="expected at least 1"):
        Vocabulary(0)


def test_padded_rows_get_no_gradient_through_a_cut_head(student: StudentModel) -> None:
    hidden = torch.randn(3, 32)
    student.head.cut(Vocabulary(390)).logits(hidden).logsumexp(-1).sum().backward()
    gradient = student.embedding.weight.grad
    assert gradient is not None
    assert gradient[:390].any(dim=1).all()
    assert not gradient[390:].any()


def test_wrapping_a_model_without_a_head_is_refused(tiny_qwen2: nn.Module) -> None:
    with pytest.raises(DistillabError, match="Qwen2Model has no output embedding"):
        PretrainedLM(tiny_qwen2.model)
