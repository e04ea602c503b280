"""在哪些 token 停下：各家的写法，由生成、考试、合成直到导出都是同一份答案。"""

import copy
import itertools
import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillab.assembly.parts import Parts, build_models
from distillab.assembly.splits import Splits
from distillab.assembly.training import build_data
from distillab.config.model_sections import LoraConfig, ModelConfig
from distillab.config.schema import Recipe
from distillab.config.sections import SamplingConfig, TaskConfig
from distillab.data.chat import render, render_prompt
from distillab.data.pairs import Task
from distillab.evaluate.subjects import Subject
from distillab.evaluate.tasks import TaskSet, accuracy
from distillab.export.convert import export_student, from_hf, student_from_teacher
from distillab.generate.generator import TextGenerator
from distillab.generate.stops import stop_ids
from distillab.models.interface import PretrainedLM, declared_eos
from distillab.models.lora import add_lora
from distillab.models.student import StudentModel
from distillab.models.tokenizer import document_separator, load_tokenizer
from distillab.synthesize.local_backend import LocalBackend
from distillab.synthesize.questions import Question
from distillab.vocabulary import Vocabulary

STOPS = {
    "qwen2.5": {"<|im_end|>", "<|endoftext|>"},
    "qwen3": {"<|im_end|>", "<|endoftext|>"},
    "llama3": {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
    "gemma3": {"<eos>", "<end_of_turn>"},
    "mistral": {"</s>"},
    "lfm2": {"<|im_end|>", "<|endoftext|>"},
    "phi3": {"<|endoftext|>", "<|assistant|>", "<|end|>"},
    "glm4": {"<|endoftext|>", "<|user|>", "<|observation|>"},
}
"""tokenizer、generation_config 与模板合起来的。"""

QUESTION = [{"role": "user", "content": "The capital of France?"}]
ANSWER = {"role": "assistant", "content": "Paris"}
FAMILY = pytest.mark.parametrize("name", STOPS)
# 另两家的这个回答里有重复的 token，之后是什么不能只看它自己。
TAUGHT = pytest.mark.parametrize(
    "name", [name for name in STOPS if name not in ("qwen3", "mistral")]
)


def taught(directory) -> tuple:
    """``(模型, tokenizer, prompt, labels)``：每个 token 之后是什么只看它自己，于是答得一字不差。"""
    tokenizer = load_tokenizer(str(directory))
    tokens = render([*QUESTION, ANSWER], tokenizer, loss_on="last")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    chain = [tokens.prompt[-1], *tokens.labels]
    generator = torch.Generator().manual_seed(0)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head is not embedding
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.zero_()  # 各层都不作声
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        for token, following in itertools.pairwise(chain):
            state = model.base_model(input_ids=torch.tensor([[token]])).last_hidden_state[0, -1]
            head[following] += state / state.norm()
    return model, tokenizer, tokens.prompt, tokens.labels


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """各家的 ``taught``，建好就留着。"""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("families") / name
            made[name] = taught(families.build(name, directory, tie_word_embeddings=False))
        return made[name]

    return make


@FAMILY
def test_the_stops_are_the_union_of_what_tokenizer_configs_and_template_say(name, answering):
    model, tokenizer, _, labels = answering(name)
    generator = TextGenerator(PretrainedLM(model), tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(sorted(generator.stop_ids))) == STOPS[name]
    assert labels[-1] in stop_ids(tokenizer)  # 模型的配置里没有写也停得下来


@TAUGHT
def test_greedy_stops_where_model_generate_does(name, answering):
    model, tokenizer, prompt, labels = answering(name)
    ids = TextGenerator(PretrainedLM(model), tokenizer).generate_ids(torch.tensor([prompt]))
    assert ids[0].tolist() == labels
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
    assert theirs[0, len(prompt) :].tolist() == labels


@TAUGHT
def test_answers_and_tasks_hold_the_response_and_nothing_of_the_turn_end(name, answering, tmp_path):
    model, tokenizer, *_ = answering(name)
    task = Task("one", QUESTION, "Paris", {})
    backend = LocalBackend(
        TextGenerator(PretrainedLM(model), tokenizer),
        lambda task: render_prompt(task.messages, tokenizer),
        SamplingConfig(temperature=0.0, max_new_tokens=20), 4, name=name,
    )  # fmt: skip
    [[answer]] = backend.answer([Question(task, 0, 0)], lambda: False)
    assert (answer.response.strip(), answer.finish_reason) == ("Paris", "stop")
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": QUESTION[0]["content"], "answer": "Paris"}) + "\n")
    config = {"source": str(path), "match": {"exact": True}, "max_new_tokens": 20}
    task_set = TaskSet.load("capitals", TaskConfig.model_validate(config))
    assert accuracy(task_set.ask(Subject("student", PretrainedLM(model), tokenizer))) == 1


@pytest.mark.parametrize(
    ("name", "adapters"), [*((name, False) for name in TAUGHT.args[1]), ("llama3", True)]
)
def test_an_export_stops_by_itself_in_plain_transformers(name, adapters, answering, tmp_path):
    model, tokenizer, _, labels = answering(name)
    student = PretrainedLM(copy.deepcopy(model))
    student.model.generation_config.eos_token_id = None  # 只剩 tokenizer 与模板的
    if adapters:
        add_lora(student, LoraConfig(target_modules=["q_proj"]))
    directory = export_student(student, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = again.generate(**ids, max_new_tokens=20)  # 其余全凭目录里写的
    assert found[0, ids["input_ids"].shape[1] :].tolist() == labels
    assert again.generation_config.pad_token_id is not None


def test_a_student_from_scratch_stops_at_the_separator_it_was_trained_on(tmp_path):
    tokenizer = families.tokenizer_of("qwen2.5")  # eos 是 <|im_end|>，文章之间是 <|endoftext|>
    torch.manual_seed(0)
    student = StudentModel(
        ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2,
                    intermediate_size=32, vocab_size=len(tokenizer), max_seq_len=64)
    )  # fmt: skip
    article = tokenizer("Paris is the capital")["input_ids"]
    ids = torch.tensor([[*article, document_separator(tokenizer)]])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(60):
        logits = student.logits(student(ids[:, :-1]))[0]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = export_student(student.eval(), tokenizer, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(directory).generate(ids[:, :1], max_new_tokens=30)
    assert found.tolist() == ids.tolist()
    assert TextGenerator(student, tokenizer).generate([article[:1]]) == [
        tokenizer.decode(article[1:])
    ]
    config = json.loads((directory / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_layers_of_a_teacher_keep_its_stops(tmp_path):
    directory = families.build("llama3", tmp_path / "teacher", tie_word_embeddings=True)
    tokenizer = load_tokenizer(str(directory))
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = set(tokenizer.convert_tokens_to_ids(sorted(STOPS["llama3"])))
    for student in (
        student_from_teacher(PretrainedLM(model), 1), from_hf(model), from_hf(directory)
    ):  # fmt: skip
        assert stop_ids(tokenizer, student) == expected
    generation = export_student(student, tokenizer, tmp_path / "out") / "generation_config.json"
    written = json.loads(generation.read_text())
    assert set(written["eos_token_id"]) == expected
    assert written["eos_token_id"][0] == written["pad_token_id"] == tokenizer.eos_token_id


def test_what_an_export_keeps_of_its_own_generation_config(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.build("phi3", tmp_path / "model"))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    model.generation_config.update(top_p=0.8, pad_token_id=-1)  # transformers 不肯保存的两样
    written = json.loads(
        (export_student(PretrainedLM(model), tokenizer, tmp_path / "out") / "generation_config.json")
        .read_text()
    )  # fmt: skip
    assert (written["top_p"], written["pad_token_id"]) == (0.8, tokenizer.pad_token_id)
    assert model.generation_config.pad_token_id == -1


@pytest.mark.parametrize("ids", [5, [5, 6], None])
def test_eos_is_one_id_or_a_list_and_of_the_text_config_too(ids):
    class Config:
        eos_token_id = ids

    assert declared_eos(Config(), object(), None) == frozenset([ids] if ids == 5 else ids or ())


def recipe(teacher, data, **student):
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
             "intermediate_size": 32, "max_seq_len": 128, **student}  # fmt: skip
    return Recipe.model_validate(
        {"name": "x", "teacher": {"path": str(teacher)}, "student": {"config": shape}, "data": data}
    )


def test_a_student_from_scratch_stops_where_its_teacher_does(tmp_path):
    teacher = families.build("llama3", tmp_path / "teacher")
    size = json.loads((teacher / "config.json").read_text())["vocab_size"]
    config = recipe(teacher, {"format": "text", "source": "unused.jsonl"}, vocab_size=size)
    parts = build_models(config.student, config.teacher, config.train)
    expected = set(parts.tokenizer.convert_tokens_to_ids(sorted(STOPS["llama3"])))
    assert stop_ids(parts.tokenizer, parts.student) == expected


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("llama3", lambda text: text, []),
        ("glm4", lambda text: text, ["'<|user|>' is trained there"]),
        (  # 模板只圈出正文，结束标记不训练
            "qwen3_next",
            lambda text: text.replace(
                "{{ m.content }}",
                "{% generation %}{{ m.content if m.role == 'assistant' }}{% endgeneration %}"
                "{{ m.content if m.role != 'assistant' }}",
            ),
            ["4 of 4 responses do not end with a token that stops generation"],
        ),
    ],
)
def test_training_says_what_was_added_and_when_the_student_cannot_learn_to_stop(
    name, edit, said, tmp_path, caplog
):
    directory = families.build(name, tmp_path / "teacher")
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = edit(tokenizer.chat_template)
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} + 1 = ?", "completion": str(i + 1)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(
        directory, {"format": "chat", "source": str(path), "max_seq_len": 128, "packing": False}
    )
    student = PretrainedLM(AutoModelForCausalLM.from_pretrained(directory))
    parts = Parts(tokenizer, None, student, Vocabulary(len(tokenizer)))
    with caplog.at_level("INFO", "distillab"):
        build_data(config, parts, Splits(config))
    stops = [line for line in caplog.messages if "stop" in line]
    assert len(stops) == len(said)
    assert all(part in line for part, line in zip(said, stops, strict=True))
