"""裁窄：留下的单元还连在原来的地方；分数是论文里的，激活取自 transformers 的同一个模型。"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from distillab.config.model_sections import ModelConfig
from distillab.config.width_sections import KeptWidths
from distillab.export.convert import export_student, from_hf
from distillab.models.pruning import WidthScores, most_active, narrowed, width_scores
from distillab.models.student import StudentModel

BASE = {"hidden_size": 48, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3,
        "intermediate_size": 40, "vocab_size": 400, "max_seq_len": 32,
        "norm_eps": 1e-9}  # fmt: skip
LAYOUTS = {
    "qwen2": {},
    "qwen3": {"head_dim": 12, "qk_norm": True, "qkv_bias": False},
    "llama": {"o_bias": True, "ffn_bias": True, "tie_embeddings": False},
    "gemma": {
        "head_dim": 6, "qkv_bias": False, "activation": "gelu_tanh", "norm_unit_offset": True,
        "post_norms": True, "scaled_embeddings": True, "query_pre_attn_scalar": 9,
        "attention_softcap": 5.0, "logit_softcap": 7.0, "sliding_window": 8,
    },
}  # fmt: skip
KEPT = {"hidden_size": 36, "intermediate_size": 31, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> StudentModel:
    return build(**LAYOUTS[request.param])


def build(**options) -> StudentModel:
    """连偏置与归一化的权重也随机。"""
    torch.manual_seed(0)
    model = StudentModel(ModelConfig(**BASE, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float("norm" in name and not model.config.norm_unit_offset)
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    model.eos_token_ids = frozenset({5})
    return model


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 400, (length,), generator=generator) for length in (20, 9, 32)]


@torch.no_grad()
def logits(model: StudentModel) -> Tensor:
    return torch.cat([model.eval().logits(model(row[None]))[0] for row in rows()])


def pruned(model: StudentModel, **widths: int) -> StudentModel:
    asked = {name: widths.get(name, getattr(model.config, name)) for name in KEPT}
    kept = most_active(width_scores(model, rows()), model.config, asked)
    return narrowed(model, kept)


def everything(**changed) -> KeptWidths:
    """全部留下，除了 ``changed``。"""
    whole = {"channels": [*range(48)], "heads": [[*range(6)]] * 2, "neurons": [[*range(40)]] * 2,
             "kv_heads": [[[0], [1], [2]]] * 2, "shares": {}}  # fmt: skip
    return KeptWidths.model_validate({**whole, **changed})


def test_keeping_everything_changes_no_bit(model: StudentModel) -> None:
    same = pruned(model)
    assert same.config == model.config
    assert same.eos_token_ids == model.eos_token_ids
    assert same.state_dict().keys() == model.state_dict().keys()
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
        assert weight.data_ptr() != model.state_dict()[name].data_ptr()


def test_the_student_is_as_wide_as_asked_and_its_heads_stay_as_wide_as_they_were(
    model: StudentModel,
) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    small = pruned(model, **KEPT)
    assert {name: getattr(small.config, name) for name in KEPT} == KEPT
    assert small.config.head_width == model.config.head_width
    assert ModelConfig.model_validate(small.config.model_dump()) == small.config
    assert logits(small).isfinite().all()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def kill(model: StudentModel) -> None:
    """每层 9 个神经元、1 组头，与 12 个通道的激活恰好是 0。"""
    width = model.config.head_width
    dead = torch.randperm(48)[:12]
    for block, group in zip(model.layers, (2, 0), strict=True):
        for linear, rows in (
            (block.ffn.up_proj, torch.randperm(40)[:9]),
            (block.attention.v_proj, torch.arange(group * width, (group + 1) * width)),
            (block.ffn.down_proj, dead),
            (block.attention.o_proj, dead),
        ):
            linear.weight[rows] = 0
            if linear.bias is not None:
                linear.bias[rows] = 0
    model.embedding.weight[:, dead] = 0


def test_units_that_are_always_zero_can_go_without_a_trace(model: StudentModel) -> None:
    kill(model)
    torch.testing.assert_close(logits(pruned(model, **KEPT)), logits(model), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_that_nothing_reads_can_go_from_the_middle_of_its_group(model: StudentModel) -> None:
    width = model.config.head_width
    unread = [[0, 3, 4], [1, 2, 5]]  # 每组一个
    for block, heads in zip(model.layers, unread, strict=True):
        for head in heads:
            block.attention.o_proj.weight[:, head * width : (head + 1) * width] = 0
    heads = [[1, 2, 5], [0, 3, 4]]
    torch.testing.assert_close(logits(narrowed(model, everything(heads=heads))), logits(model))


@torch.no_grad()
def test_groups_whose_keys_and_values_agree_can_share_one_head(model: StudentModel) -> None:
    for block in model.layers:
        for linear in (block.attention.k_proj, block.attention.v_proj):
            for each in linear.parameters():
                heads = each.view(3, -1)
                heads[:] = heads[0]
    merged = narrowed(model, everything(kv_heads=[[[0, 1, 2]]] * 2))
    assert merged.config.num_kv_heads == 1
    torch.testing.assert_close(logits(merged), logits(model))


def test_heads_that_share_one_get_the_mean_of_theirs(model: StudentModel) -> None:
    merged = narrowed(model, everything(kv_heads=[[[0, 2]], [[1, 2]]], heads=[[0, 1, 4, 5]] * 2))
    attention, source = merged.layers[0].attention, model.layers[0].attention
    for name, weight in attention.state_dict().items():
        if name.startswith(("k_proj", "v_proj")):
            heads = source.state_dict()[name].view(3, *weight.shape)
            torch.testing.assert_close(weight, (heads[0] + heads[2]) / 2)


@torch.no_grad()
def test_the_order_of_units_in_the_source_does_not_matter(model: StudentModel) -> None:
    expected = logits(pruned(model, **KEPT))
    shuffle(model)
    torch.testing.assert_close(logits(pruned(model, **KEPT)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def shuffle(model: StudentModel) -> None:
    """同一个函数，神经元、组、组内的头、通道换了次序。"""
    before = logits(model)
    channels = torch.randperm(48).tolist()
    heads, kv_heads, neurons = [], [], []
    for _ in model.layers:
        groups = torch.randperm(3).tolist()
        heads.append([2 * group + i for group in groups for i in torch.randperm(2).tolist()])
        kv_heads.append([[group] for group in groups])
        neurons.append(torch.randperm(40).tolist())
    order = everything(channels=channels, heads=heads, kv_heads=kv_heads, neurons=neurons)
    model.load_state_dict(narrowed(model, order).state_dict())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kept", "sources"),
    [
        (6, 3, [0, 1, 2, 3, 4, 5], [[0], [1], [2]]),
        (3, 3, [1, 2, 4], [[0], [1], [2]]),  # 每组留一个
        (4, 2, [0, 1, 4, 5], [[0], [2]]),  # 去掉一组
        (2, 2, [1, 4], [[0], [2]]),
        (1, 1, [4], [[2]]),
        (6, 1, [0, 1, 2, 3, 4, 5], [[0, 1, 2]]),  # 只少键值头：平均
        (6, 2, [0, 1, 2, 3, 4, 5], [[0, 1], [1, 2]]),
        (4, 1, [0, 1, 4, 5], [[0, 2]]),
        (3, 1, [1, 4, 5], [[0, 2]]),
    ],
)
def test_which_heads_go_together(
    heads: int, kv_heads: int, kept: list[int], sources: list[list[int]]
) -> None:
    row = torch.tensor([[1.0, 5.0, 3.0, 2.0, 9.0, 6.0]])
    scores = WidthScores(row, torch.ones(1, 40), torch.ones(48))
    widths = {"hidden_size": 48, "intermediate_size": 40, "num_heads": heads,
              "num_kv_heads": kv_heads}  # fmt: skip
    found = most_active(scores, ModelConfig(**BASE), widths)
    assert (found.heads, found.kv_heads) == ([kept], [sources])
    assert found.widths == widths
    assert found.shares["heads"] == pytest.approx(float(row[0, kept].sum() / row.sum()))


@torch.no_grad()
def test_transformers_computes_the_same_from_the_export(
    model: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    small = pruned(model, **KEPT)
    theirs = AutoModelForCausalLM.from_pretrained(
        export_student(small, tiny_tokenizer, tmp_path / "out"), attn_implementation="eager"
    ).eval()
    expected = torch.cat([theirs(row[None]).logits[0] for row in rows()])
    torch.testing.assert_close(logits(small), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scores_are_the_papers_on_the_activations_of_transformers(tiny_qwen2: nn.Module) -> None:
    """arXiv:2407.14679，§2.2：序列上取绝对值的平均，批上取 L2，通道的再在各层相加。"""
    seen: dict[str, list[Tensor]] = {}
    for name, module in tiny_qwen2.named_modules():
        module.register_forward_hook(
            lambda _, given, output, name=name: (
                seen.setdefault(name, []).append(
                    given[0] if name.endswith(("o_proj", "down_proj")) else output
                )
                if name.endswith(("o_proj", "down_proj", "layernorm"))
                else None
            )
        )
    batch = torch.arange(60).view(4, 15)
    for row in batch:
        tiny_qwen2(row[None])
    stacked = {name: torch.cat(values) for name, values in seen.items()}  # [B, T, n]

    def score(values: Tensor) -> Tensor:
        return values.abs().mean(1).square().sum(0).sqrt()

    found = width_scores(from_hf(tiny_qwen2), batch)
    channels = sum(score(v) for name, v in stacked.items() if name.endswith("layernorm"))
    torch.testing.assert_close(found.channels, channels)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        heads = stacked[f"{prefix}.self_attn.o_proj"].unflatten(-1, (4, 8)).norm(dim=-1)
        torch.testing.assert_close(found.heads[layer], score(heads))
        torch.testing.assert_close(found.neurons[layer], score(stacked[f"{prefix}.mlp.down_proj"]))
