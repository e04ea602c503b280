"""lm-evaluation-harness 在我们的模型接口上：每个请求的结果都与它自己的 Hugging Face 接口相同，不要 hub。"""

import json
import sys

import pytest
import torch
from lm_eval_tasks import write_tasks

from distillab.config.sections import LmEvalConfig
from distillab.errors import DistillabError
from distillab.evaluate import harness
from distillab.evaluate.harness import check_harness, evaluate_with_harness
from distillab.evaluate.harness_lm import HarnessLM
from distillab.models.interface import PretrainedLM

NAMES = ["tiny_choose", "tiny_words", "tiny_write"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def config(tasks):
    def config(*names, **values):
        return LmEvalConfig(tasks=list(names or NAMES), include_path=str(tasks), **values)

    return config


def requests_of(config):
    """三个任务的全部请求，按种类。"""
    found = {}
    for task in harness.check_harness(config).load(config.tasks)["tasks"].values():
        harness._prepare(task.task_name, task, config)
        task.build_all_requests()
        for request in task.instances:
            found.setdefault(request.request_type, []).append(request)
    return found


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_every_request_gets_what_its_own_hugging_face_model_gives(
    config, tiny_qwen2, tiny_tokenizer, num_fewshot
):
    from lm_eval.models.huggingface import HFLM

    with torch.no_grad():
        tiny_qwen2.get_input_embeddings().weight[399] = 0  # 它只认 eos，我们写到 <|im_end|> 也停
    requests = requests_of(config(num_fewshot=num_fewshot))
    assert {kind: len(part) for kind, part in requests.items()} == {
        "loglikelihood": 48, "loglikelihood_rolling": 4, "generate_until": 12
    }  # fmt: skip
    ours = HarnessLM(PretrainedLM(tiny_qwen2), tiny_tokenizer, 5)
    theirs = HFLM(pretrained=tiny_qwen2, tokenizer=tiny_tokenizer, batch_size=3)
    for (mine, mine_greedy), (value, is_greedy) in zip(
        ours.loglikelihood(requests["loglikelihood"]),
        theirs.loglikelihood(requests["loglikelihood"]),
        strict=True,
    ):
        assert (mine, mine_greedy) == (pytest.approx(value, rel=1e-4), is_greedy)
    rolling = requests["loglikelihood_rolling"]
    lengths = [len(tiny_tokenizer(request.args[0])["input_ids"]) for request in rolling]
    assert min(lengths) < 64 < max(lengths)  # 有的要分几窗
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-4
    )
    texts = ours.generate_until(requests["generate_until"])
    assert texts == theirs.generate_until(requests["generate_until"])
    assert not any("a" in text or "\n" in text for text in texts)
    assert len(set(map(len, texts))) > 1


def test_generation_ends_where_the_text_to_stop_at_is_written(
    config, tiny_qwen2, tiny_tokenizer, monkeypatch
):
    lm = HarnessLM(PretrainedLM(tiny_qwen2), tiny_tokenizer, 16)
    steps = []
    generate = lm._generator.generate_ids

    def counted(*arguments, **options):
        new_ids = generate(*arguments, **options)
        steps.append(new_ids.shape[1])
        return new_ids

    monkeypatch.setattr(lm._generator, "generate_ids", counted)
    (request, *_) = requests_of(config("tiny_write"))["generate_until"]
    request.arguments = (request.args[0], {"max_gen_toks": 20})
    (whole,) = lm.generate_until([request])
    stop = whole[3:5]
    request.arguments = (request.args[0], {"max_gen_toks": 20, "until": [stop]})
    assert lm.generate_until([request]) == [whole[: whole.index(stop)]]
    assert steps[1] < steps[0] == 20


def test_sampled_texts_repeat_and_differ_from_request_to_request(
    config, tiny_qwen2, tiny_tokenizer
):
    lm = HarnessLM(PretrainedLM(tiny_qwen2), tiny_tokenizer, 2)
    requests = requests_of(config("tiny_write"))["generate_until"][:1] * 3
    for request in requests:
        request.arguments = (request.args[0], {"do_sample": True, "temperature": 1.0})
        request.arguments[1]["max_gen_toks"] = 12
    first = lm.generate_until(requests)
    assert len(set(first)) == 3
    assert lm.generate_until(requests) == first


def test_results_are_per_task_and_per_item(config, tiny_qwen2, tiny_tokenizer):
    found = evaluate_with_harness(PretrainedLM(tiny_qwen2), tiny_tokenizer, config(limit=8))
    assert json.loads(json.dumps(found)) == found
    assert found["lm_eval"] == "0.4.13"
    assert found["items_per_second"] > 0
    assert set(found["tasks"]) == set(NAMES)
    choose, words = found["tasks"]["tiny_choose"], found["tasks"]["tiny_words"]
    assert (choose["items"], choose["version"], choose["num_fewshot"]) == (8, 3.0, 0)
    assert set(choose["metrics"]) == {"acc", "acc_norm"}
    for metric, value in choose["metrics"].items():
        assert len(choose["per_item"][metric]) == 8
        assert sum(choose["per_item"][metric]) / 8 == pytest.approx(value)
    assert words["higher_is_better"]["word_perplexity"] is False
    assert words["metrics"]["word_perplexity"] > 1
    assert words["per_item"] == {}


def test_an_exported_directory_is_enough(config, tiny_qwen2, tiny_tokenizer, tmp_path):
    tiny_qwen2.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    found = evaluate_with_harness(str(tmp_path / "model"), None, config("tiny_choose"))
    again = evaluate_with_harness(PretrainedLM(tiny_qwen2), tiny_tokenizer, config("tiny_choose"))
    assert found["tasks"] == again["tasks"]
    with pytest.raises(ValueError, match="without a tokenizer"):
        evaluate_with_harness(PretrainedLM(tiny_qwen2), None, config("tiny_choose"))


def test_your_own_tasks_do_not_wait_for_the_built_in_ones(config, monkeypatch):
    harness._task_manager.cache_clear()
    check_harness(config())
    assert harness._task_manager.cache_info().currsize == 1


@pytest.fixture
def few_built_in(tasks, monkeypatch):
    """自带的任务只剩几个：读完一万多个 YAML 要半分钟。"""
    from lm_eval.tasks import TaskManager

    def few(include_path, include_defaults):
        assert include_path is None or include_defaults in (True, False)
        return TaskManager(include_path=str(tasks), include_defaults=False)

    harness._task_manager.cache_clear()
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    yield
    harness._task_manager.cache_clear()


def refusal(config, **changes):
    with pytest.raises(DistillabError) as caught:
        check_harness(config.model_copy(update=changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_tasks_are_refused_by_name(config, few_built_in):
    assert refusal(config("tiny_chose")) == (
        "evaluate.lm_eval.tasks: no task named 'tiny_chose'; did you mean 'tiny_choose'?"
    )
    assert refusal(config("quite different"), include_path=None) == (
        "evaluate.lm_eval.tasks: no task named 'quite different'; list them with: lm-eval ls tasks"
    )


def test_missing_directory_and_missing_package_are_refused(config, monkeypatch):
    assert refusal(config(), include_path="no/such") == (
        "evaluate.lm_eval.include_path: 'no/such' is not a directory"
    )
    harness._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert refusal(config()).endswith("pip install 'distillab[lm-eval]'")


def test_missing_data_are_refused_in_one_line(config, tasks, tiny_qwen2, tiny_tokenizer):
    (tasks / "choose.jsonl").unlink()
    with pytest.raises(DistillabError) as caught:
        evaluate_with_harness(PretrainedLM(tiny_qwen2), tiny_tokenizer, config("tiny_choose"))
    assert str(caught.value).startswith(
        "cannot load the data of evaluate.lm_eval.tasks 'tiny_choose': Unable to find"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "the generation option 'num_beams' of a task is not supported; choose"),
        ({"max_gen_toks": 64}, "tiny_write generates up to 64 tokens, expected fewer than the"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 2, "top_p": 0.5}, "at most one of top_k"),
    ],
)
def test_generation_that_the_model_cannot_do_is_refused(
    config, tiny_qwen2, tiny_tokenizer, options, message
):
    lm = HarnessLM(PretrainedLM(tiny_qwen2), tiny_tokenizer, 2)
    (request, *_) = requests_of(config("tiny_write"))["generate_until"]
    request.arguments = (request.args[0], {"max_gen_toks": 8} | options)
    with pytest.raises(DistillabError, match=message):
        lm.generate_until([request])


def test_a_task_that_runs_the_models_code_is_refused(
    config, tiny_qwen2, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.UNSAFE_CODE", True, raising=False)
    with pytest.raises(DistillabError, match="tiny_choose runs code that the model writes"):
        evaluate_with_harness(PretrainedLM(tiny_qwen2), tiny_tokenizer, config("tiny_choose"))


def test_grad_and_training_mode_are_left_as_they_were(config, tiny_qwen2, tiny_tokenizer):
    model = PretrainedLM(tiny_qwen2).train()
    evaluate_with_harness(model, tiny_tokenizer, config("tiny_choose", limit=2))
    assert model.training
    assert torch.is_grad_enabled()
