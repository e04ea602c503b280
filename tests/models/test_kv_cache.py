"""KV cache：接上不复制，丢行不走样，与 transformers 自己的缓存给出相同的东西。"""

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, Qwen2Config

from distillab.models.kv_cache import LayerCache, dynamic_cache


def pair(length, batch=3):
    return torch.randn(batch, 2, length, 4), torch.randn(batch, 2, length, 6)


@pytest.mark.parametrize("chunks", [[5, 1, 1], [1] * 200, [100, 70, 1, 1, 300]])
def test_contents_are_the_chunks_in_order(chunks):
    torch.manual_seed(0)
    cache, parts = LayerCache(), [pair(length) for length in chunks]
    for key, value in parts:
        keys, values = cache.update(key, value)
    assert torch.equal(keys, torch.cat([key for key, _ in parts], dim=2))
    assert torch.equal(values, torch.cat([value for _, value in parts], dim=2))


def test_autocast_stores_what_attention_would_cast_to():
    cache, (keys, values) = LayerCache(), pair(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = cache.update(keys, values)
    for part, whole in zip(found, (keys, values), strict=True):
        assert torch.equal(part, whole.bfloat16())


def test_a_new_token_seldom_copies_the_old_ones():
    cache, stores = LayerCache(), set()
    cache.update(*pair(100))
    for _ in range(900):
        keys, _ = cache.update(*pair(1))
        stores.add(keys.data_ptr())
    assert len(stores) <= 7


def test_selected_rows_keep_their_contents_and_grow_on():
    torch.manual_seed(0)
    cache, first = LayerCache(), pair(5)
    cache.batch_select_indices(torch.tensor([0]))  # 空的缓存没有行可丢
    cache.update(*first)
    kept = torch.tensor([2, 0])
    cache.batch_select_indices(kept)
    assert torch.equal(cache.keys, first[0][kept])
    more = pair(100, batch=2)
    keys, values = cache.update(*more)
    assert torch.equal(keys, torch.cat((first[0][kept], more[0]), dim=2))
    assert torch.equal(values, torch.cat((first[1][kept], more[1]), dim=2))


def test_it_stands_in_for_the_cache_of_transformers():
    config = Qwen2Config(num_hidden_layers=2, num_attention_heads=4, hidden_size=16)
    ours, theirs = dynamic_cache(config), DynamicCache(config=config)
    torch.manual_seed(0)
    for length in (7, 1, 1, 90):
        for layer in range(2):
            parts = pair(length)
            for found, expected in zip(
                ours.update(*parts, layer), theirs.update(*parts, layer), strict=True
            ):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(ours.layers[1].keys, theirs.layers[1].keys)


def test_layers_with_a_sliding_window_stay_as_they_are():
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    expected = [type(layer) for layer in DynamicCache(config=config).layers]
    sliding, full = dynamic_cache(config).layers
    assert type(sliding) is expected[0]
    assert isinstance(full, LayerCache)
    assert isinstance(full, expected[1])
