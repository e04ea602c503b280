"""真实权重（SmolLM2-135M-Instruct）上与 transformers 的对照。"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillab.export.convert import export_student, from_hf
from distillab.generate.generator import TextGenerator
from distillab.models.student import StudentModel

pytestmark = pytest.mark.slow

LOGIT_TOLERANCE = 1e-4
PROMPTS = [
    "The capital of France is",
    "Knowledge distillation is a technique in which a large model",
    "def fibonacci(n):",
]


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def student(smollm2_dir: Path) -> StudentModel:
    return from_hf(smollm2_dir).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_imported_logits_equal_transformers(
    reference: tuple[Any, Any], student: StudentModel, padded: bool, cached: bool
) -> None:
    model, tokenizer = reference
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch.input_ids, batch.attention_mask
    if not padded:
        ids, mask = ids[1:2], None  # 最长的一条，没有填充
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    if cached:
        cache, half = student.new_cache(), ids.shape[1] // 2
        first = student(ids[:, :half], None if mask is None else mask[:, :half], cache)
        hidden = torch.cat((first, student(ids[:, half:], mask, cache)), 1)
    else:
        hidden = student(ids, mask)
    gap = (student.logits(hidden) - expected).abs().amax(-1)
    assert float((gap if mask is None else gap[mask.bool()]).max()) <= LOGIT_TOLERANCE


def test_greedy_text_equals_transformers_token_for_token(
    reference: tuple[Any, Any], student: StudentModel
) -> None:
    model, tokenizer = reference
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    generator = TextGenerator(student, tokenizer)
    found = generator.generate_ids(batch.input_ids, batch.attention_mask, max_new_tokens=40)
    expected = model.generate(
        **batch, do_sample=False, max_new_tokens=40, eos_token_id=sorted(generator.stop_ids)
    )
    assert found.tolist() == expected[:, batch.input_ids.shape[1] :].tolist()


@torch.no_grad()
def test_exported_directory_gives_the_same_logits_and_tokens(
    reference: tuple[Any, Any], student: StudentModel, tmp_path: Path
) -> None:
    model, tokenizer = reference
    directory = export_student(student, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(directory).eval()
    text = "Don't stop!!!\n\n\nI'll say: 3.14 中国的首都是北京。"
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == tokenizer(text)["input_ids"]
    assert float((again(ids).logits - model(ids).logits).abs().max()) <= LOGIT_TOLERANCE
