"""GPU 上的生成与导出，与 CPU 的、与 transformers 的相同。"""

import torch
from check_parts import VOCAB, Plain, pretrained, relative, student
from transformers import Qwen2Config, Qwen2ForCausalLM

from distillab.export.convert import to_hf_state_dict
from distillab.generate.cuda_graph import recordable
from distillab.generate.generator import TextGenerator, padded
from distillab.generate.sampling import sample_tokens
from distillab.generate.stops import until_stop
from distillab.generate.weights import sampling_logits
from distillab.models.interface import PretrainedLM
from distillab.targets import Head


def generation_equals_cpu(device, strategy):
    """float32：逐个 token 相同；有填充的与没有的，``StudentModel`` 与 transformers 的模型。"""
    count = 0
    own, theirs = student(), pretrained(0.2)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    own.eval()
    theirs.eval()
    for model in (own, PretrainedLM(theirs)):
        expected = []
        for place in ("cpu", device):
            generator = TextGenerator(model.to(place), Plain())
            for lengths in ((5, 5), (3, 9, 6)):
                rows = [[(31 * n + 7 * i) % VOCAB for i in range(n)] for n in lengths]
                ids, mask = padded(rows, 0, torch.device(place))
                found = generator.generate_ids(
                    ids, mask, strategy=strategy, max_new_tokens=40, seeds=list(lengths)
                ).tolist()
                expected.append(found)
        half = len(expected) // 2
        for left, right in zip(expected[:half], expected[half:], strict=True):
            assert left == right, first_difference(left, right)
            count += sum(map(len, left))
    return f"{count} tokens equal"


def sampling_is_recorded(device):
    """一步录得下来；停下的行丢掉、重录之后，其余的行仍与 CPU 的相同。"""
    own, theirs = student().eval(), PretrainedLM(pretrained(0.2).eval())
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    rows = [[(31 * n + 7 * i) % VOCAB for i in range(2 + n)] for n in range(16)]
    count = 0
    for model in (own, theirs):
        found = []
        for place in ("cpu", device):
            generator = TextGenerator(model.to(place), Plain())
            generator.stop_ids = frozenset(range(0, VOCAB, 24))
            ids, mask = padded(rows, 0, torch.device(place))
            new_ids = generator.generate_ids(
                ids, mask, strategy="sample", max_new_tokens=110, seeds=range(16)
            )
            found.append(new_ids.tolist())
        assert found[0] == found[1], first_difference(*found)
        assert device == "cpu" or recordable(model), "the step was not recorded"
        count += sum(len(until_stop(row, generator.stop_ids)) for row in found[0])
    return f"{count} tokens equal"


def tokens_are_drawn_as_on_the_cpu(device):
    """同样的 logits 与随机数，选同一个 token；离边界 1e-7 之内的不算。"""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 20_011, generator=generator)
    uniform = torch.rand(2000, dtype=torch.float64, generator=generator)
    expected = sample_tokens(logits, uniform)
    found = sample_tokens(logits.to(device), uniform.to(device)).cpu()
    other = (found != expected).nonzero()[:, 0].tolist()
    for row in other:
        boundaries = logits[row].double().softmax(-1).cumsum(-1)
        assert (boundaries - uniform[row]).abs().min() < 1e-7, f"row {row}"
    return f"{2000 - len(other)} of 2000 rows equal, {len(other)} at a boundary"


def half_head_has_float32_logits(device):
    """半精度的 head 原样相乘，与先转成 float32 的相同到求和的次序。"""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        head = Head(torch.randn(VOCAB, 512, device=device, dtype=dtype))
        hidden = torch.randn(8, 512, device=device, dtype=dtype)
        found, expected = sampling_logits(head)(hidden), head.logits(hidden)
        assert found.dtype == torch.float32
        worst = max(worst, relative(found, expected.double()))
    assert worst <= 1e-5, f"error {worst:.1e}"
    return f"error {worst:.1e}"


def first_difference(left, right):
    for row, (one, other) in enumerate(zip(left, right, strict=True)):
        for step, pair in enumerate(zip(one, other, strict=True)):
            if pair[0] != pair[1]:
                return f"row {row}, token {step}: {pair[0]} on the CPU, {pair[1]} here"
    return "lengths differ"


def converted_equals_own(device):
    """导出成 transformers 的 Qwen2 之后，隐状态不变。"""
    own = student().eval().to(device)
    c = own.config
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            intermediate_size=c.intermediate_size, vocab_size=c.vocab_size,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )  # fmt: skip
    theirs.load_state_dict(to_hf_state_dict(own), strict=False)
    theirs.eval().to(device)
    ids = torch.arange(40, device=device).view(2, 20) * 17 % VOCAB
    with torch.no_grad():
        error = relative(own(ids), theirs.model(ids).last_hidden_state.double())
    assert error <= 1e-5, f"hidden states differ by {error:.1e}"
    return f"hidden states within {error:.1e}"
