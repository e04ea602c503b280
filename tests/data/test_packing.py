"""几条放进一行与各占一行（padding）是同一件事：同样的标签、损失与梯度，谁也看不见谁。"""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import an_example, vocabularies
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from distillab.batch import Example, Tokens, collate_examples, collate_packed, collate_text
from distillab.config.model_sections import ModelConfig
from distillab.config.schema import LossConfig
from distillab.data.chat_dataset import ChatDataset
from distillab.data.packing import PackedDataset, best_fit, collate_rows, keeps_documents_apart
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.teachers.in_process import LocalTeacher
from distillab.train.module import DistillationModule
from distillab.vocabulary import Vocabulary

VOCAB = 400
VOCABULARY = Vocabulary(VOCAB)


@st.composite
def some_sizes(draw):
    capacity = draw(st.integers(1, 40))
    size = st.tuples(st.integers(1, capacity), st.integers(1, capacity))
    return draw(st.lists(size, max_size=60)), capacity


@settings(deadline=None, max_examples=200)
@given(some_sizes(), st.integers(0, 5), st.sampled_from([1, 7, 1000]))
def test_every_document_is_in_one_row_and_every_row_fits_both_views(case, seed, together):
    sizes, capacity = case
    rows = best_fit(sizes, capacity, seed, together)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[i][0] for i in row) <= capacity
        assert sum(sizes[i][1] for i in row) <= capacity
    assert rows == best_fit(sizes, capacity, seed, together)


def test_another_seed_puts_others_together():
    sizes = [(n % 9 + 1, n % 9 + 1) for n in range(200)]
    assert best_fit(sizes, 20, seed=0) != best_fit(sizes, 20, seed=1)


def test_realistic_lengths_fill_the_rows():
    rng = random.Random(0)
    lengths = [min(512, max(8, int(rng.lognormvariate(4.5, 0.9)))) for _ in range(3000)]
    rows = best_fit([(n, n) for n in lengths], 512)
    assert sum(lengths) / (512 * len(rows)) > 0.97
    assert len(rows) == len({id(row) for row in rows})


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.lists(an_example(), min_size=1, max_size=4), min_size=1, max_size=4),
    vocabulary=st.none() | vocabularies,
)
def test_row_i_of_both_views_predicts_label_i(rows, vocabulary):
    batch = collate_packed(rows, 0, vocabulary)
    examples = [example for row in rows for example in row]
    assert batch.labels.tolist() == [
        label
        for example in examples
        for label in example.student.labels
        if vocabulary is None or label in vocabulary
    ]
    assert batch.examples == tuple(examples)
    assert (batch.teacher is batch.student) == all(e.teacher is e.student for e in examples)
    for name in ("student", "teacher"):
        view = getattr(batch, name)
        assert view.attention_mask is None
        assert torch.equal(view.input_ids.flatten()[view.index + 1], batch.labels)
        # 预测它的位置与它在同一段里：位置恰好差一
        positions = view.position_ids.flatten()
        assert torch.equal(positions[view.index] + 1, positions[view.index + 1])
        for ids, places, row in zip(view.input_ids, view.position_ids, rows, strict=True):
            documents = [getattr(example, name).ids for example in row]
            starts = (places == 0).nonzero().flatten().tolist()
            pieces = [piece.tolist() for piece in ids.tensor_split(starts[1:])]
            assert pieces[: len(documents)] == documents
            assert all(not any(piece) for piece in pieces[len(documents) :])
            assert len(pieces) <= len(documents) + 1


# ---------------------------------------------------------------------- 与 padding 相等


def examples(privileged: bool) -> list[Example]:
    """长短不一；response 有一段的、有两段的；教师的 prompt 长出不同的一截。"""
    rng = random.Random(3)

    def ids(count):
        return [rng.randrange(1, VOCAB) for _ in range(count)]

    found = []
    for number in range(7):
        response, between = ids(3 + number), ids(number % 3)
        body = [*response[:2], *between, *response[2:]]

        def view(prompt, body=body, between=between):
            places = [i for i in range(len(body)) if not 2 <= i < 2 + len(between)]
            return Tokens([*prompt, *body, 397], [len(prompt) + i for i in places])

        prompt = ids(2 + number % 4)
        student = view(prompt)
        found.append(Example(student, view([*ids(5 + number), *prompt]) if privileged else student))
    return found


def sums_and_gradients(model, batch, teacher, alpha):
    module = DistillationModule(model, LossConfig(alpha=alpha, temperature=1.0), VOCABULARY).train()
    module.zero_grad()
    targets = teacher.targets(batch.teacher, VOCABULARY) if alpha else None
    sums = module(batch, targets)
    sums.total.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return sums, gradients


@pytest.fixture
def students(tiny_config, tiny_qwen2, tiny_llama):
    torch.manual_seed(1)
    own = StudentModel(tiny_config)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    eager = copy.deepcopy(tiny_qwen2)
    eager.set_attn_implementation("eager")
    recomputed = copy.deepcopy(own)
    recomputed.enable_activation_checkpointing()
    return {
        "student": own,
        "recomputed": recomputed,
        "qwen2": PretrainedLM(tiny_qwen2),
        "eager": PretrainedLM(eager),
        "llama": PretrainedLM(tiny_llama),
    }


METHODS = {"online": (0.5, False), "skd": (1.0, True), "seqkd": (0.0, False)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["student", "recomputed", "qwen2", "eager", "llama"])
def test_packed_is_padded_in_value_and_gradient(students, tiny_qwen2, name, method):
    alpha, privileged = METHODS[method]
    teacher = LocalTeacher(PretrainedLM(copy.deepcopy(tiny_qwen2)))
    found = examples(privileged)
    rows = PackedDataset(ChatDataset(found, max_seq_len=48), seed=2)
    packed = collate_rows([rows[i] for i in range(len(rows))], pad_id=0)
    assert 1 < len(packed.student.input_ids) < len(found)
    order = [i for row in rows.rows for i in row]
    padded = collate_rows([found[i] for i in order], pad_id=0)
    assert torch.equal(packed.labels, padded.labels)
    left, expected = sums_and_gradients(students[name], padded, teacher, alpha)
    right, gradients = sums_and_gradients(students[name], packed, teacher, alpha)
    for value, other in zip(right, left, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert norm > 0.01
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() < 1e-4 * norm, key


@pytest.mark.parametrize("name", ["student", "qwen2", "eager", "llama"])
def test_a_document_does_not_see_the_one_before_it(students, name):
    model = students[name].eval()
    first, other, second = Tokens([5, 6, 7, 8], [2]), Tokens([9, 2, 3, 1], [2]), [11, 12, 13]
    second = Tokens(second, [1])
    hidden = [
        model(view.input_ids, position_ids=view.position_ids)[0]
        for row in ([first, second], [other, second], [second])
        for view in [collate_packed([[Example(t, t) for t in row]], 0).student]
    ]
    torch.testing.assert_close(hidden[0][4:], hidden[1][4:], rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden[0][4:], hidden[2], rtol=1e-4, atol=1e-5)
    assert (hidden[0][:4] - hidden[1][:4]).abs().max() > 0.01
    whole = model(torch.tensor([[*first.ids, *second.ids]]))[0, 4:]
    assert (whole - hidden[0][4:]).abs().max() > 0.01


def test_a_document_does_not_see_the_padding_behind_it(students):
    rows = [[Example(t, t)] for t in (Tokens([5, 6], [1]), Tokens([1, 2, 3, 4, 5, 6], [3]))]
    views = [collate_packed(rows, pad).student for pad in (0, 9)]
    for model in students.values():
        left, right = (model.eval()(v.input_ids, position_ids=v.position_ids) for v in views)
        torch.testing.assert_close(left[0, :2], right[0, :2], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- 谁能把文档隔开


def test_own_and_transformers_attention_keep_documents_apart(students):
    for name, model in students.items():
        model.train()
        assert keeps_documents_apart(model), name
        assert model.training, name


def test_half_precision_keeps_documents_apart(students):
    for name, model in students.items():
        assert keeps_documents_apart(model.to(torch.bfloat16)), name


def test_models_that_carry_a_state_or_take_no_positions_do_not(students, tiny_qwen2):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    for model in (bloom, mamba):
        assert not keeps_documents_apart(PretrainedLM(model)), type(model).__name__

    class Leaky(StudentModel):
        def forward(self, input_ids, attention_mask=None, cache=None, position_ids=None):
            return super().forward(input_ids, attention_mask, cache)

    assert not keeps_documents_apart(Leaky(ModelConfig(**students["student"].config.model_dump())))


# ---------------------------------------------------------------------- 数据集


def test_rows_are_those_of_the_data_and_their_fingerprint_says_how(students):
    data = ChatDataset(examples(True), max_seq_len=48, name="train")
    rows = PackedDataset(data)
    assert [example for row in rows for example in row] == [data[i] for r in rows.rows for i in r]
    others = {PackedDataset(data, 40).fingerprint, PackedDataset(data, seed=1).fingerprint}
    assert len(others | {rows.fingerprint, data.fingerprint}) == 4
    sizes = data.view_lengths
    assert rows.filled[0] == pytest.approx(sum(s for s, _ in sizes) / (48 * len(rows)))
    assert rows.filled[1] == pytest.approx(sum(t for _, t in sizes) / (48 * len(rows)))


def test_validation_is_padded_as_without_packing():
    found = examples(True)
    batch = collate_rows(found, 0)
    expected = collate_examples(found, 0)
    assert batch.student.position_ids is None
    assert torch.equal(batch.teacher.input_ids, expected.teacher.input_ids)


# ---------------------------------------------------------------------- 文本


def test_the_articles_of_a_chunk_are_apart_and_nobody_guesses_the_next_beginning():
    ids = torch.tensor([5, 6, 9, 7, 9, 9, 8, 4])
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    item = {"input_ids": ids, "labels": labels}
    batch = collate_text([item, item], separator=9)
    assert batch.student.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]] * 2
    assert batch.labels.tolist() == [6, 9, 9, 4] * 2
    assert batch.student.index.tolist() == [0, 1, 3, 6, 8, 9, 11, 14]
    plain = collate_text([item])
    assert plain.student.position_ids is None
    assert len(plain) == 7


def test_articles_of_a_chunk_are_those_of_padded_rows(students):
    articles = [[5, 6, 7, 397], [8, 9, 397], [10, 11, 12, 13, 397]]
    ids = torch.tensor([t for article in articles for t in article])
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    chunk = collate_text([{"input_ids": ids, "labels": labels}], separator=397)
    views = [Tokens(article, list(range(1, len(article)))) for article in articles]
    padded = collate_examples([Example(view, view) for view in views], 0)
    assert torch.equal(chunk.labels, padded.labels)
    for model in students.values():
        left, expected = sums_and_gradients(model, padded, SimpleNamespace(), 0.0)
        right, found = sums_and_gradients(model, chunk, SimpleNamespace(), 0.0)
        torch.testing.assert_close(right.total, left.total, rtol=1e-4, atol=1e-6)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4)
