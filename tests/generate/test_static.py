"""形状固定的解码：与随长度增长的逐个 token 相同，录下的一步只用设备上的东西。"""

import logging
from collections.abc import Callable

import pytest
import torch
from model_types import model_of
from torch.utils._python_dispatch import TorchDispatchMode

from distillab.config.model_sections import LoraConfig
from distillab.export.convert import from_hf
from distillab.generate import cuda_graph, decoding, generator
from distillab.generate.generator import TextGenerator, padded
from distillab.generate.own_form import joined_form, own_form
from distillab.generate.stops import StopTexts
from distillab.models.head_fit import relative_error, tolerance
from distillab.models.interface import PretrainedLM
from distillab.models.lora import adapter_parameters, add_lora
from distillab.models.own_blocks import SharedDecoder

CPU = torch.device("cpu")


def with_adapters(hf):
    model = add_lora(PretrainedLM(hf), LoraConfig(rank=4))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.fixture(params=["student", "qwen2", "olmo2", "lora"])
def model(request, tiny_qwen2, tiny_llama):
    return {
        "student": lambda: from_hf(tiny_qwen2),
        "qwen2": lambda: PretrainedLM(tiny_qwen2),
        "olmo2": lambda: PretrainedLM(model_of("olmo2")),
        "lora": lambda: with_adapters(tiny_llama),
    }[request.param]()


@pytest.fixture
def student(tiny_qwen2):
    return from_hf(tiny_qwen2)


def prompts(count=9):
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(400, (3 + 2 * n,), generator=draw).tolist() for n in range(count)]


@pytest.fixture
def both(tiny_tokenizer, monkeypatch) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``(增长的缓存, 形状固定的)`` 的结果，词表的十六分之一都算停止。"""

    def run(model, rows, stops=range(0, 400, 16), **options):
        text = TextGenerator(model, tiny_tokenizer)
        text.stop_ids = frozenset(stops)
        found = []
        for devices in ((), ("cpu",)):
            monkeypatch.setattr(generator, "FIXED_SHAPES_ON", devices)
            given = {name: make() if callable(make) else make for name, make in options.items()}
            found.append(text.generate_ids(*padded(rows, text.pad_id, CPU), **given))
        return found

    return run


class Tape(TorchDispatchMode):
    """录下的算子，重放时读写原来的那些张量：正是 CUDA graph 的规矩。"""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, recorded in self.calls:
            result = func(*args, **kwargs)
            returns = func._schema.returns
            if len(returns) == 1:
                result, recorded = (result,), (recorded,)
            for declared, new, old in zip(returns, result, recorded, strict=True):
                if declared.alias_info is None and isinstance(new, torch.Tensor):
                    old.copy_(new)  # 视图与就地的不必


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """在 CPU 上录；返回录过的。"""
    made: list[Tape] = []

    def record(_, step):
        with Tape() as tape:
            step()
        made.append(tape)
        return tape.replay

    monkeypatch.setattr(decoding, "recordable", lambda _: True)
    monkeypatch.setattr(decoding, "record", record)
    return made


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_fixed_shapes_give_the_same_tokens_with_padding_and_rows_that_stop(model, strategy, both):
    options = {"strategy": strategy, "temperature": 2.0, "max_new_tokens": 40}
    growing, fixed = both(model, prompts(), seeds=range(9), **options)
    assert growing.tolist() == fixed.tolist()
    assert (growing[:, -1] == 0).sum() < 9


@pytest.mark.parametrize("strategy", ["top_k", "top_p"])
def test_filters_see_the_same_logits(student, strategy, both):
    options = {"strategy": strategy, "temperature": 2.0, "max_new_tokens": 20}
    growing, fixed = both(student, prompts(), seeds=range(9), **options)
    assert growing.tolist() == fixed.tolist()


def test_rows_of_equal_length_need_no_mask(model, both):
    growing, fixed = both(model, [p[:3] for p in prompts()], stops=[], max_new_tokens=20)
    assert growing.tolist() == fixed.tolist()
    assert growing.shape == (9, 20)


def test_the_result_ends_where_the_longest_row_does(student, both):
    options = {"strategy": "sample", "temperature": 9.0, "max_new_tokens": 40}
    growing, fixed = both(student, prompts(), stops=range(0, 400, 2), seeds=range(9), **options)
    assert growing.shape[1] < decoding.CHECK_EVERY, "the test needs rows that stop early"
    assert growing.tolist() == fixed.tolist()


def test_generation_ends_at_max_seq_len(student, both):
    growing, fixed = both(student, [list(range(60))], stops=[], max_new_tokens=50)
    assert growing.tolist() == fixed.tolist()
    assert fixed.shape[1] == 4


def test_one_token_is_the_prompt_alone(student, both):
    growing, fixed = both(student, prompts(), max_new_tokens=1)
    assert growing.tolist() == fixed.tolist()


def test_stop_texts_end_their_rows_at_once(student, tiny_tokenizer, both):
    text, ends = TextGenerator(student, tiny_tokenizer), []

    def stop_texts():
        ends.append(StopTexts(["a", "t"], [], text.decode, 9))
        return ends[-1]

    growing, fixed = both(student, prompts(), stops=[], max_new_tokens=30, on_token=stop_texts)
    assert growing.tolist() == fixed.tolist()
    assert ends[0].rows == ends[1].rows
    assert len({len(row) for row in ends[0].rows}) > 1


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_a_recorded_step_is_replayed_with_nothing_from_the_host(model, strategy, both, tapes):
    options = {"strategy": strategy, "temperature": 2.0, "max_new_tokens": 24}
    growing, fixed = both(model, prompts(), stops=[399], seeds=range(9), **options)
    assert growing.tolist() == fixed.tolist()
    assert len(tapes) == 1
    names = {str(func) for func, *_ in tapes[0].calls}
    assert not [name for name in names if "local_scalar" in name or "nonzero" in name]


def test_a_streamed_text_is_replayed_too(student, tiny_tokenizer, tapes, monkeypatch):
    text, pieces = TextGenerator(student, tiny_tokenizer), []
    expected = text.generate("The capital", max_new_tokens=20)
    monkeypatch.setattr(generator, "FIXED_SHAPES_ON", ("cpu",))
    assert text.generate("The capital", max_new_tokens=20, stream=pieces.append) == expected
    assert "".join(pieces) == expected[0]
    assert len(tapes) == 1


def test_rows_are_dropped_from_a_recorded_step_when_half_have_ended_long_before_the_end(
    student, tiny_tokenizer, tapes, monkeypatch
):
    monkeypatch.setattr(generator, "FIXED_SHAPES_ON", ("cpu",))
    monkeypatch.setattr(decoding, "RERECORD_STEPS", 16)
    ended_at = torch.tensor([5, 5, 5, 20, 20, 99, 99, 99])
    seen: list[int] = []

    def ends(rows, _):
        seen.append(len(rows))
        return ended_at[rows] <= len(seen)

    text = TextGenerator(student, tiny_tokenizer)
    text.stop_ids = frozenset()
    ids = torch.arange(24).view(8, 3)
    found = text.generate_ids(ids, max_new_tokens=40, on_token=ends)
    assert seen == [8] * 20 + [3] * 20  # 3 of 8 are fewer than half, 5 are not
    assert len(tapes) == 2
    monkeypatch.setattr(generator, "FIXED_SHAPES_ON", ())
    seen.clear()
    assert torch.equal(found, text.generate_ids(ids, max_new_tokens=40, on_token=ends))


class Waits(TorchDispatchMode):
    """主机向设备要数的次数。"""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_the_host_asks_once_in_sixteen_tokens(student, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(generator, "FIXED_SHAPES_ON", ("cpu",))
    text = TextGenerator(student, tiny_tokenizer)
    text.stop_ids = frozenset()
    with Waits() as waits:
        text.generate_ids(torch.arange(9).view(3, 3), max_new_tokens=48)
    assert waits.count == 48 // 16 + 1  # 最后一次是截到最长的一行


def test_a_failed_recording_is_one_warning_and_the_same_tokens(student, both, monkeypatch, caplog):
    def fails(step):
        step()
        raise cuda_graph._RecordingFailed from RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graph, "_FAILED", set())
    monkeypatch.setattr(cuda_graph, "_recorded", fails)
    monkeypatch.setattr(decoding, "recordable", lambda _: not cuda_graph._FAILED)
    with caplog.at_level(logging.WARNING, "distillab"):
        for _ in range(2):
            growing, fixed = both(student, prompts(), max_new_tokens=30)
            assert growing.tolist() == fixed.tolist()
    (line,) = caplog.messages
    assert "a CUDA graph cannot be recorded here" in line
    assert line.endswith("(RuntimeError: operation not permitted)")


@torch.no_grad()
def test_a_half_precision_step_is_the_same_to_rounding_and_its_keys_are_half(student):
    ids, hidden = torch.arange(8).view(2, 4), []
    with torch.autocast("cpu", torch.bfloat16):
        for cache in (student.new_cache(), student.static_cache(128)):
            student(ids[:, :3], None, cache)
            if cache.layers[0].keys.shape[2] == 128:
                cache.places.begin(3, None, CPU)
            hidden.append(student(ids[:, 3:], None, cache))
            assert cache.layers[0].keys.dtype == torch.bfloat16
    assert relative_error(hidden[1], hidden[0]) < tolerance(torch.bfloat16)


def test_a_pretrained_model_of_our_layout_runs_through_our_blocks(tiny_qwen2, tiny_llama):
    model = PretrainedLM(tiny_qwen2)
    model.model.model.embed_tokens.weight.requires_grad_(False)
    before = [(id(p), p.requires_grad) for p in model.parameters()]
    form = own_form(model)
    assert isinstance(form, SharedDecoder)
    assert own_form(model) is form
    assert [(id(p), p.requires_grad) for p in model.parameters()] == before
    assert {id(p) for p in form.parameters()} == {name for name, _ in before}
    model.model.model.norm.weight = torch.nn.Parameter(torch.ones(32))
    assert own_form(model) is not form
    adapted = with_adapters(tiny_llama)
    assert own_form(adapted) is adapted


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_joined_layers_are_half_copies_of_what_the_model_is_now(kind, monkeypatch):
    model = own_form(PretrainedLM(model_of(kind)))
    model._compiled_call_impl = lambda *_: pytest.fail("not the copy's forward")
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            form = joined_form(model, 16)
            expected = model.forward(ids)
            assert relative_error(form(ids), expected) < tolerance(torch.bfloat16)
        assert form is not model
        assert {p.dtype for p in form.parameters()} == {torch.float32, torch.bfloat16}
        assert all(p.dtype == torch.float32 and p.numel() for p in model.parameters())
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert joined_form(model, 16) is model  # 没有 autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert joined_form(model, 8) is model
        model.bfloat16()
        assert joined_form(model, 16) is model


@pytest.mark.parametrize("training", [False, True])
def test_sampling_in_half_precision_leaves_the_model_as_it_was(
    student, tiny_tokenizer, tapes, monkeypatch, training
):
    monkeypatch.setattr(generator, "FIXED_SHAPES_ON", ("cpu",))
    student.train(training)
    before = {name: (p.data_ptr(), p.dtype) for name, p in student.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        TextGenerator(student, tiny_tokenizer).generate("A", max_new_tokens=20)
    assert {name: (p.data_ptr(), p.dtype) for name, p in student.named_parameters()} == before
    assert all(module.training is training for module in student.modules())
    products = [str(func) for func, *_ in tapes[0].calls if "mm" in str(func)]
    assert len(products) == 4 * 3 + 1  # qkv、o、gate 与 up、down，三层；head


def test_a_model_with_windows_keeps_its_growing_cache():
    assert PretrainedLM(model_of("mistral")).static_cache(128) is None
    assert PretrainedLM(model_of("bloom")).static_cache(128) is None  # ALiBi 要二维的 mask
    assert PretrainedLM(model_of("llama")).static_cache(128) is not None


def test_a_static_cache_that_forgets_is_found_out(tiny_llama, monkeypatch):
    from distillab.models import static_cache

    model = PretrainedLM(tiny_llama)
    monkeypatch.setattr(static_cache.Places, "step", lambda places: (
        places.at[None], torch.zeros(1, 1, 1, places.room)
    ))  # fmt: skip
    assert model.static_cache(128) is None
    assert "what follows a static cache" in model._why_not_static
