"""配方文件：extends、覆盖、原样再读，以及每种错误印出的那一行。"""

import json
from pathlib import Path

import pytest

from distillab.config.model_sections import ModelConfig
from distillab.config.recipes import (
    dump_recipe,
    load_recipe,
    recipe_schema,
    shipped_recipes,
)
from distillab.errors import DistillabError
from distillab.parsing import differing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


BASE = "teacher: {path: t}\ndata: {source: text.txt}\n"


def message(*arguments):
    with pytest.raises(DistillabError) as caught:
        load_recipe(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_shipped_recipe_loads_is_short_and_names_the_schema():
    recipes = shipped_recipes()
    assert set(recipes) == {
        "quickstart", "wiki-zh", "wiki-zh-trimmed", "qwen3-chat", "experience/seqkd", "experience/skd",
        "experience/gkd", "experience/demo-seqkd", "experience/demo-skd", "experience/demo-gkd",
    }  # fmt: skip
    for name, path in recipes.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        up = "../" * name.count("/")
        assert lines[0] == f"# yaml-language-server: $schema={up}schema.json"
        assert len(lines) <= 35
        assert load_recipe(name).description


def test_wiki_zh_is_the_documented_experiment():
    recipe = load_recipe("wiki-zh")
    assert recipe.teacher.path == "Qwen/Qwen2.5-0.5B"
    assert recipe.teacher.dtype == "float16"
    assert recipe.student.config == ModelConfig(
        hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=2,
        intermediate_size=2048, vocab_size=151936, max_seq_len=512,
        rope_theta=1e6, norm_eps=1e-6, dropout=0.0,
    )  # fmt: skip
    assert (recipe.loss.alpha, recipe.loss.temperature) == (0.5, 2.0)
    assert (recipe.data.subset, recipe.data.size_mb) == ("20231101.zh", 50)


@pytest.mark.parametrize("method", ["seqkd", "skd", "gkd"])
def test_experience_recipes_are_the_documented_experiments(method):
    recipe = load_recipe(f"experience/{method}")
    train = recipe.train
    assert recipe.teacher.path == recipe.student.path == "Qwen/Qwen3-8B"
    assert recipe.data.template_options == {"enable_thinking": False}
    assert (train.batch_size, train.gradient_accumulation_steps) == (2, 8)
    assert (train.learning_rate, train.num_epochs, train.warmup_ratio) == (2e-5, 3, 0.1)
    assert train.precision == "bf16"
    fraction, loss = recipe.responses.student_fraction, recipe.loss
    assert (loss.divergence, loss.alpha, fraction) == {
        "seqkd": ("forward_kl", 0.0, 0.0),
        "skd": ("forward_kl", 1.0, 0.0),
        "gkd": ("jsd", 1.0, 0.5),
    }[method]
    if method == "gkd":
        assert (loss.beta, recipe.sampling.temperature, recipe.sampling.max_new_tokens) == (
            0.5, 0.9, 256,
        )  # fmt: skip


def test_child_states_only_its_difference_and_mappings_merge(write):
    write("base.yaml", BASE + "description: parent\ntrain: {batch_size: 2, seed: 7}\n")
    child = load_recipe(write("child.yaml", "extends: base.yaml\ntrain: {batch_size: 3}\n"))
    assert (child.train.batch_size, child.train.seed) == (3, 7)
    assert (child.name, child.description) == ("child", "")


def test_an_alias_is_a_copy(write):
    path = write("r.yaml", "teacher: &model {path: t}\nstudent: *model\ndata: {source: text.txt}\n")
    recipe = load_recipe(path, ["teacher.dtype=float32", "student.path=s"])
    assert (recipe.teacher.path, recipe.student.path) == ("t", "s")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(write):
    path = write("r.yaml", BASE + "train: {learning_rate: 1.0e-3}\n")
    overrides = ["train.learning_rate=3e-4", "train.learning_rate=2e-4", "evaluate.prompts=[a, b]"]
    recipe = load_recipe(path, overrides)
    assert recipe.train.learning_rate == 2e-4
    assert recipe.evaluate.prompts == ["a", "b"]


def test_scientific_notation_without_a_dot_is_a_number(write):
    assert (
        load_recipe(write("r.yaml", BASE + "train: {learning_rate: 3e-4}\n")).train.learning_rate
        == 3e-4
    )


def test_the_trimmed_variant_differs_in_its_vocabulary_alone():
    whole, trimmed = (load_recipe(name) for name in ("wiki-zh", "wiki-zh-trimmed"))
    assert trimmed.student.vocab is not None
    trimmed.student.vocab = None
    both = [one.model_dump(mode="json") for one in (whole, trimmed)]
    assert {key for key, _ in differing(both)} == {"name", "description"}


@pytest.mark.parametrize("name", ["quickstart", "wiki-zh", "wiki-zh-trimmed", "qwen3-chat"])
def test_resolved_recipe_reads_back_the_same_and_can_still_be_overridden(write, name):
    recipe = load_recipe(name)
    saved = write("recipe.yaml", dump_recipe(recipe))
    assert load_recipe(saved) == recipe
    both = [one.model_dump(mode="json") for one in (load_recipe(saved, ["loss.alpha=0"]), recipe)]
    assert differing(both) == [
        ("loss.alpha", [0.0, recipe.loss.alpha]),
        ("train.alpha", [0.0, recipe.loss.alpha]),
    ]


def test_schema_file_is_current_and_knows_every_key():
    schema = recipe_schema()
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == schema
    assert set(schema["properties"]) == {
        "extends", "name", "description", "student", "teacher", "data", "responses", "sampling",
        "synthesize", "loss", "train", "evaluate",
    }  # fmt: skip
    assert schema["$defs"]["TeacherSection"]["additionalProperties"] is False


def test_unknown_name_suggests_the_nearest_recipe():
    assert message("quickstrat") == "no recipe named 'quickstrat'; did you mean 'quickstart'?"


def test_missing_file_is_named():
    assert message("nowhere/x.yaml") == "nowhere/x.yaml: no such recipe file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {learning_rat: 1}", "{}: unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
        ("trian: {}", "{}: unknown key 'trian'; did you mean 'train'?"),
        ("train: {batch_size: two}", "{}: train.batch_size: found 'two', expected integer"),
        ("train: {batch_size: 0}", "{}: train.batch_size: found 0, expected greater than 0"),
        ("train: {batch_size: true}", "{}: train.batch_size: found True, expected integer"),
        ("train: {learning_rate: .inf}", "{}: train.learning_rate: found inf, expected a finite number"),
        ("train: {precision: fp8}", "{}: train.precision: found 'fp8'; choose from auto, bf16, fp16, fp32"),
        ("loss: {divergence: forward-kl}", "{}: loss.divergence: found 'forward-kl'; did you mean 'forward_kl'?"),
        ("loss: {beta: 0.5}", "{}: loss: beta belongs to jsd, but divergence is forward_kl"),
        ("loss: 3", "{}: loss: found 3, expected a mapping with keys divergence, alpha, temperature, beta, skew, tau, label_smoothing"),
        ("student: {init: {from: teacher, layer: 3}}", "{}: unknown key 'student.init.layer'; did you mean 'layers'?"),
        ("student: {init: {from: teacher, layers: 3, choose: influense}}", "{}: student.init.choose: found 'influense', expected influence, greedy, even or a list of layers; did you mean 'influence'?"),
        ("student: {init: {from: teacher, layers: 3, choose: 3}}", "{}: student.init.choose: found 3, expected influence, greedy, even or a list of layers"),
        ("student: {init: {from: teacher, choose: []}}", "{}: student.init.choose: found [], expected influence, greedy, even or a list of layers"),
        ("student: {init: {from: teacher, choose: [0, 0]}}", "{}: student.init.choose: found [0, 0], expected different layers from 0, in ascending order"),
        ("student: {init: {from: teacher, choose: [2, 1]}}", "{}: student.init.choose: found [2, 1], expected different layers from 0, in ascending order"),
        ("student: {init: {from: teacher, choose: [-1, 1]}}", "{}: student.init.choose: found [-1, 1], expected different layers from 0, in ascending order"),
        ("student: {init: {from: teacher, choose: [true, 2]}}", "{}: student.init.choose: found [True, 2], expected influence, greedy, even or a list of layers"),
        ("student: {init: {from: teacher, layers: 3, choose: [1, 2]}}", "{}: student.init: layers=3 and choose disagree: it lists 2 layers"),
        ("student: {config: {num_layers: 3}, init: {from: teacher, choose: [1, 2]}}", "{}: student: init.layers=2 and config.num_layers=3 disagree"),
        ("data: {mixture: [{source: a.jsonl}]}", "{}: data: a mixture has at least 2 sources; one alone is data itself"),
        ("data: {mixture: [{source: a}, {source: b, weight: 0}]}", "{}: data.mixture.1.weight: found 0, expected greater than 0"),
        ("data: {mixture: [{source: a}, {source: b, weight: .nan}]}", "{}: data.mixture.1.weight: found nan, expected a finite number"),
        ("data: {mixture: [{source: a}, {source: b, wieght: 2}]}", "{}: unknown key 'data.mixture.1.wieght'; did you mean 'weight'?"),
        ("data: {mixture: [{source: x/a.txt}, {source: y/a.jsonl}]}", "{}: data: 2 sources are named 'a': give each its own name"),
        ("data: {mixture: [{source: a}, {source: 中文}]}", "{}: data: mixture.1 has no name: give it one"),
        ("data: {mixture: [{source: a}, {source: b}], source: c}", "{}: data: source and mixture disagree: every source of the mixture has its own keys; move source into them"),
        ("data: {mixture: [{source: a}, {source: b, experience: hint}]}", "{}: data.mixture.1: experience and format=text disagree: set format: chat"),
        ("data: {mixture: [{source: a, streaming: true}, {source: b}]}", "{}: data.mixture.0.streaming=true needs train.max_steps: a stream has no end"),
        ("teacher: null", "{}: loss.alpha=0.5 needs a teacher: set teacher.path, or loss.alpha to 0"),
        ("student: {config: {num_heads: 7}}", "{}: student.config: hidden_size=512 is not divisible by num_heads=7"),
    ],
)  # fmt: skip
def test_invalid_values_end_in_one_line_naming_file_key_and_choice(write, text, expected):
    key = text.partition(":")[0]
    base = "\n".join(line for line in BASE.splitlines() if not line.startswith(key))
    path = write("r.yaml", f"{base}\n{text}\n")
    assert message(path) == expected.format(path)


def test_a_mixture_replaces_the_inherited_source_and_takes_overrides_by_number(write):
    write("base.yaml", BASE)
    mixture = "data: {mixture: [{source: a.jsonl}, {source: b.jsonl, weight: 3}]}"
    child = write("child.yaml", f"extends: base.yaml\n{mixture}\n")
    found = load_recipe(str(child), ["data.mixture.0.weight=2", "data.mixture.1.sampling.top_k=5"])
    ours, other = found.data.mixture
    assert (ours.name, ours.weight, other.name, other.weight) == ("a", 2, "b", 3)
    assert other.sampling.top_k == 5
    again = write("again.yaml", dump_recipe(found))
    assert load_recipe(str(again)) == found
    assert "items 0 to 1, found '2'" in message(child, ["data.mixture.2.weight=2"])


def test_error_names_the_file_that_set_the_key(write):
    parent = write("base.yaml", BASE + "train: {batch_size: -1}\n")
    child = write("child.yaml", "extends: base.yaml\ntrain: {seed: 1}\n")
    assert message(child).startswith(f"{parent}: train.batch_size: found -1")
    assert message(child, ["train.batch_size=-2"]).startswith("--set: train.batch_size: found -2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty; a recipe needs at least data.source"),
        ("- a\n- b\n", "found a list, expected a mapping"),
        ("train: {batch_size: [1,\n", "not valid YAML"),
        (BASE + "data: {source: y}\n", ":3: not valid YAML: key 'data' is given twice"),
        ("teacher: {path: t}\n", "key 'data' is required"),
        ("extends: bse.yaml\n", "extends: no file bse.yaml; did you mean 'base.yaml'?"),
        ("extends: [a]\n", "extends: found ['a'], expected one file name"),
    ],
)
def test_unreadable_recipes_say_why(write, text, expected):
    write("base.yaml", BASE)
    assert expected in message(write("r.yaml", text))


def test_recipe_that_extends_itself_is_refused(write):
    write("a.yaml", "extends: b.yaml\n")
    assert "extends itself" in message(write("b.yaml", "extends: a.yaml\n"))


def test_binary_file_is_not_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in message(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "override", ["train.learning_rate", "=3", "train..seed=1", "train.seed=[1"]
)
def test_malformed_overrides_are_refused(override):
    assert message("quickstart", [override]).startswith(f"--set {override.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 2026-13-45", "r.yaml: not valid YAML: month must be in 1..12"),
        ("a: !!bool x", "r.yaml: not valid YAML: KeyError: 'x'"),
        (f"a: {'9' * 5000}", "r.yaml: not valid YAML: Exceeds the limit (4300 digits)"),
        (f"a: {'[' * 4000}", "r.yaml: not valid YAML: it is nested too deeply"),
        (f"a: {'[' * 150}{']' * 150}", "r.yaml: nested more than 100 levels deep"),
        ("a: &a [*a]", "r.yaml: not valid YAML: found unconstructable recursive node"),
        ("a: &a {b: *a, c: *a}", "r.yaml: not valid YAML: found unconstructable recursive node"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "\n".join(
                f"{n}: &{n} [{', '.join([f'*{chr(ord(n) - 1)}'] * 9)}]" for n in "bcdefghi"
            ),
            "r.yaml: holds more than 100,000 values",
        ),
        (f"a: {'x' * 2**20}", "r.yaml: holds 1,048,579 characters, expected at most 1,048,576"),
        ("a: \x07", "r.yaml: not valid YAML: cannot be parsed"),
        ("? [a]\n: b", "r.yaml:1: not valid YAML: found unhashable key"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path, text, expected):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    found = message(str(path))
    assert found.startswith(f"{tmp_path}/{expected}"), found
    assert "\n" not in found


def test_aliases_of_yaml_are_separate_values(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "data: {source: a.jsonl}\nloss: {alpha: 0}\n"
        "student: {config: &tiny {hidden_size: 32, num_heads: 2, num_kv_heads: 2}, tokenizer: x}\n"
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["student.config.num_heads=4"])
    assert recipe.student.config.num_heads == 4
