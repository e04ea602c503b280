"""配置的默认值与校验规则，以及各节之间的矛盾。"""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from distillab.config.model_sections import ModelConfig
from distillab.config.schema import LossConfig, Recipe, TrainingConfig
from distillab.config.sections import DataSection, SynthesizeConfig

GEMMA = {"norm_unit_offset": True, "post_norms": True, "scaled_embeddings": True}


def test_model_config_has_the_documented_defaults_and_qwen25s_layout():
    layout = {"tie_embeddings": True, "activation": "silu", "qkv_bias": True}
    absent = (None, False)  # 别家才有的
    rest = ModelConfig().model_dump()
    documented = {
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "num_kv_heads": 2,
        "intermediate_size": 2048,
        "vocab_size": 151936,
        "max_seq_len": 512,
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
        "dropout": 0.0,
    }
    assert {key: rest.pop(key) for key in documented} == documented
    assert {key: rest.pop(key) for key in layout} == layout
    assert all(value in absent for value in rest.values())


def test_training_config_keeps_the_documented_defaults():
    documented = {
        "batch_size": 8,
        "learning_rate": 3e-4,
        "weight_decay": 0.01,
        "warmup_steps": 500,
        "num_epochs": 3,
        "gradient_clip": 1.0,
        "alpha": 0.5,
        "temperature": 2.0,
        "checkpoint_dir": "checkpoints/",
        "log_interval": 50,
        "eval_interval": 500,
        "save_interval": 1000,
    }
    defaults = TrainingConfig().model_dump()
    assert {key: defaults[key] for key in documented} == documented
    assert defaults["min_learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("qwen2", {"head_dim": 64, "sliding_window": 8}),
        ("llama", {"o_bias": True, "ffn_bias": True}),
        ("llama", {"head_dim": 32}),
        ("qwen3", {"qk_norm": True, "hidden_size": 510, "head_dim": 64}),
        ("mistral", {"qkv_bias": False, "sliding_window": 8}),
        ("gemma2", {**GEMMA, "attention_softcap": 50.0, "logit_softcap": 30.0}),
        ("gemma3_text", {**GEMMA, "qk_norm": True, "sliding_window": 8, "rope_local_theta": 1e4}),
    ],
)
def test_the_options_together_are_a_layout_of_transformers(layout, values):
    assert ModelConfig(**values).layout == layout


def test_keeping_layers_keeps_what_each_of_them_sees():
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = ModelConfig(
        **GEMMA,
        qk_norm=True,
        num_layers=3,
        layer_types=types,
        sliding_window=8,
        rope_local_theta=1e4,
    )
    kept = config.keeping([0, 2])
    assert (kept.num_layers, kept.slides(0), kept.slides(1)) == (2, True, False)
    assert ModelConfig(**dict(config.keeping([2]))).sliding_window is None


def test_model_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().hidden_size = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 510}, "hidden_size=510 is not divisible by num_heads=8"),
        ({"num_kv_heads": 3}, "num_heads=8 is not divisible by num_kv_heads=3"),
        ({"hidden_size": 24, "num_heads": 8}, "must be even"),
        ({"head_dim": 7}, "head_dim, or else hidden_size / num_heads = 7 must be even"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, expected num_layers=12"),
        ({"layer_types": ["sliding_attention"] * 12}, "which needs sliding_window"),
        (
            {"layer_types": ["full_attention"] * 12, "sliding_window": 8},
            "sliding_window is given, but no layer slides",
        ),
        ({"rope_local_theta": 1e4}, "rope_local_theta is given, but no layer slides"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs original_max_position_"),
        ({"qkv_bias": False, "o_bias": True}, "o_bias=True needs qkv_bias=True"),
        (
            {"attention_softcap": 50.0},
            "attention_softcap=50.0 does not fit the other options: .* qwen2, the nearest, has "
            "attention_softcap=None",
        ),
        (
            {**GEMMA, "qk_norm": True, "attention_softcap": 50.0},
            "qk_norm=True does not fit .* gemma2, the nearest, has qk_norm=False",
        ),
        ({**GEMMA, "post_norms": False}, "post_norms=False does not fit .* gemma2, the nearest"),
        ({"qk_norm": True, "ffn_bias": True}, "does not fit the other options"),
        (
            {"qkv_bias": False, "hidden_size": 30, "head_dim": 8},
            "hidden_size=30 is not divisible by num_heads=8, which llama needs even with head_dim",
        ),
        ({"vocab_size": 0}, "greater than 0"),
        ({"max_seq_len": 0}, "greater than 0"),
        ({"dropout": 1.0}, "less than 1"),
        ({"rope_theta": float("nan")}, "finite number"),
        ({"hidden_dim": 512}, "Extra inputs"),
        ({"hidden_size": "512"}, "valid integer"),
    ],
)
def test_impossible_models_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "jsd", "beta": 0.0}, "use divergence forward_kl"),
        ({"divergence": "jsd", "beta": 1.0}, "use divergence reverse_kl"),
        ({"divergence": "jsd", "beta": 1.5}, "strictly between 0 and 1"),
        ({"beta": 0.5}, "beta belongs to jsd, but divergence is forward_kl"),
        ({"divergence": "skew_forward_kl", "skew": 1.0}, "strictly between 0 and 1"),
        ({"divergence": "jsd", "skew": 0.1}, "skew belongs to skew_forward_kl"),
        ({"alpha": 1.1}, "less than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_impossible_objectives_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        LossConfig(**values)


def test_divergences_with_a_parameter_have_a_default_for_it():
    assert LossConfig(divergence="jsd").beta == 0.5
    assert LossConfig(divergence="skew_reverse_kl").skew == 0.1


def recipe(**sections):
    return Recipe.model_validate(
        {"name": "x", "data": {"source": "text.txt"}, "teacher": {"path": "teacher"}, **sections}
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": None}, r"loss\.alpha=0\.5 needs a teacher"),
        ({"teacher": None, "loss": {"alpha": 0.0}}, "set student.tokenizer"),
        (
            {
                "teacher": None,
                "loss": {"alpha": 0.0},
                "student": {"init": {"from": "teacher", "layers": 2}},
            },
            "student.init.from=teacher needs teacher.path",
        ),
        ({"student": {"path": "a", "config": {}}}, "path and config disagree"),
        (
            {"student": {"path": "a", "init": {"from": "teacher", "layers": 2}}},
            "path and init disagree",
        ),
        ({"student": {"init": {"from": "teacher"}}}, r"init needs layers, or config\.num_layers"),
        (
            {"student": {"init": {"from": "teacher", "layers": 2}, "config": {"num_layers": 3}}},
            r"init\.layers=2 and config\.num_layers=3 disagree",
        ),
        ({"student": {"sha256": "0" * 64}}, "belong to student.path"),
        (
            {
                "student": {"config": {"max_seq_len": 64}},
                "data": {"source": "x", "max_seq_len": 65},
            },
            r"data\.max_seq_len=65 is above student\.config\.max_seq_len=64",
        ),
        ({"train": {"max_steps": 10, "warmup_steps": 10}}, "leaves nothing of train.max_steps=10"),
        (
            {"train": {"min_learning_rate": 1.0}},
            "min_learning_rate=1 is above learning_rate=0.0003",
        ),
        ({"train": {"betas": [0.9, 1.0]}}, "must lie in"),
        (
            {"loss": {"alpha": 0.3}, "train": {"alpha": 0.4}},
            r"loss\.alpha=0\.3 and train\.alpha=0\.4 disagree",
        ),
        ({"name": "../x"}, "pattern"),
        ({"evaluate": {"tasks": {"a/b": {"source": "x", "match": {"exact": True}}}}}, "pattern"),
        ({"evaluate": {"tasks": {"a": {"source": "x", "match": {}}}}}, "exactly one of"),
        ({"train": {"warmup_ratio": 1.0}}, "less than 1"),
    ],
)
def test_contradictions_between_keys_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**sections)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_source": "b.jsonl"}, "teacher_source and format=text disagree"),
        ({"loss_on": "last"}, "loss_on and format=text disagree"),
        ({"format": "chat", "experience": "x", "teacher_source": "y"}, "drop one"),
        ({"format": "chat", "experience_role": "user"}, "experience_role says how .* there is none"),
        ({"format": "chat", "experience_template": "{message} {experience}"}, "there is none"),
        ({"format": "chat", "experience": "x", "experience_template": "{experience}"},
         r"has no \{message\}"),
    ],
)  # fmt: skip
def test_keys_of_data_that_have_no_meaning_together_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        DataSection(source="a.jsonl", **values)


def test_all_chat_data_is_read_unless_a_size_is_given():
    assert DataSection(source="a.jsonl").size_mb == 50
    assert DataSection(source="a.jsonl", format="chat").size_mb is None
    assert DataSection(source="a.jsonl", format="chat", size_mb=2.0).size_mb == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 2}, "samples=2 and sampling.temperature=0 disagree"),
        (
            {"server": {"base_url": "https://me:key@host/v1", "model": "m"}},
            "name that in api_key_env",
        ),
        ({"server": {"base_url": "host/v1", "model": "m"}}, "expected a URL such as"),
    ],
)
def test_synthesis_that_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        SynthesizeConfig(**values)


@pytest.mark.parametrize("section", ["loss", "train"])
def test_alpha_and_temperature_mean_the_same_in_loss_and_train(section):
    found = recipe(**{section: {"alpha": 0.25, "temperature": 3.0}})
    assert (found.loss.alpha, found.train.alpha) == (0.25, 0.25)
    assert (found.loss.temperature, found.train.temperature) == (3.0, 3.0)


@pytest.mark.parametrize(
    "module",
    ["distillab", "distillab.cli", "distillab.config.recipes", "distillab.report.terminal_tables"],
)
def test_importing_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_all_resolve():
    import distillab

    for name in distillab.__all__:
        assert getattr(distillab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distillab.nothing


def test_a_trimmed_vocabulary_decides_its_size_and_stays_undecided_when_saved():
    shape = {"hidden_size": 64, "vocab_size": None}
    found = recipe(student={"config": shape, "vocab": {"keep": "corpus"}})
    assert "vocab_size" not in found.student.config.model_fields_set
    values = found.values()
    assert "vocab_size" not in values["student"]["config"]
    assert Recipe.model_validate(values) == found
    given = recipe(student={"config": shape | {"vocab_size": 99}, "vocab": {"keep": "corpus"}})
    assert Recipe.model_validate(given.values()).student.config.vocab_size == 99
    with pytest.raises(ValidationError, match="vocab_size"):
        recipe(student={"config": shape})


def test_probability_is_moved_only_where_a_teacher_gives_it():
    student = {"tokenizer": "t", "vocab": {"keep": "corpus", "outside": "bucket"}}
    with pytest.raises(
        ValidationError, match=r"student\.vocab\.outside=bucket needs teacher\.path"
    ):
        recipe(student=student, teacher=None, loss={"alpha": 0.0})
    alm = {"divergence": "alm", "alpha": 1.0}
    with pytest.raises(ValidationError, match=r"student\.vocab and loss\.divergence=alm disagree"):
        recipe(student={"vocab": {"keep": "corpus"}}, loss=alm)
