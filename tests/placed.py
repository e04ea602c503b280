"""后加的 token 排在别处的 tokenizer：词表因而有空洞，或与别的长短不一。"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def placed(tokenizer, **ids):
    """``tokenizer``，后加的 token 改用给定的 id；没有的就加上。

    Args:
        tokenizer: ``tiny_tokenizer``。
        ids: 名字 → id；名字 ``im_end`` 就是 ``<|im_end|>``。
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    wanted = {f"<|{name}|>": index for name, index in ids.items()}
    known = {token["content"]: token for token in spec["added_tokens"]}
    plain = spec["added_tokens"][0] | {"special": False}
    for content in wanted.keys() - known.keys():
        known[content] = plain | {"content": content}
    for content, token in known.items():
        token["id"] = wanted.get(content, token["id"])
        spec["model"]["vocab"][content] = token["id"]  # 否则读入时从词表的个数起重新编号
    spec["added_tokens"] = sorted(known.values(), key=lambda token: token["id"])
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    found.chat_template = tokenizer.chat_template
    assert all(found.convert_tokens_to_ids(token) == index for token, index in wanted.items())
    return found
