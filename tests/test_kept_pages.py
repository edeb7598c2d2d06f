"""Key/value pages are kept between calls (docs/engine.md): fewer touches of new memory, the same bits."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ouro

pytestmark = pytest.mark.core


def pages(model, positions):
    return -(-positions // 64) * model.config.n_steps * model.info()["kv_page_bytes"]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_used_pages_give_the_bits_of_new_ones(kv_dtype):
    fresh, used = (ouro.load("ouro-tiny", kv_dtype=kv_dtype) for _ in range(2))
    used.generate(list(range(1, 150)), max_new_tokens=2, eos_token_id=[])
    assert used.free_pages() == pages(used, 151) and used._core.kept_pages() == 0
    used.trace(list(range(300, 450)))
    assert used._core.kept_pages() == pages(used, 150)
    for ids in (list(range(5, 12)), list(range(40, 110))):
        np.testing.assert_array_equal(used.trace(ids).logits, fresh.trace(ids).logits)
        fresh.free_pages()
        arguments = {"max_new_tokens": 70, "eos_token_id": [], "speculate": "auto"}
        assert used.generate(ids, **arguments).token_ids == fresh.generate(ids, **arguments).token_ids
        fresh.free_pages()
    assert used._core.kept_pages() == pages(used, 150), "no more pages than were once in use"


def test_free_memory_asks_every_model_that_lives():
    ouro.free_memory()
    one, other = (ouro.load("ouro-tiny") for _ in range(2))
    one.trace([1, 2, 3])
    other.trace(list(range(70)))
    assert ouro.free_memory() == pages(one, 3) + pages(other, 70)
    other.trace([1])
    del other
    assert ouro.free_memory() == 0


def test_pages_are_made_beforehand():
    model, fresh = ouro.load("ouro-tiny"), ouro.load("ouro-tiny")
    ids = list(range(1, 100))
    assert model.reserve(100) == model._core.kept_pages() == pages(model, 100)
    assert model.reserve(30) == pages(model, 100), "no fewer than there are"
    np.testing.assert_array_equal(model.trace(ids).logits, fresh.trace(ids).logits)
    assert model._core.kept_pages() == pages(model, 100), "they were used"
    with pytest.raises(ValueError, match="n_tokens is -1"):
        model.reserve(-1)


def test_an_engine_may_use_what_is_kept():
    model = ouro.load("ouro-tiny")
    ids = list(range(1, 130))
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=[]).token_ids
    kept = model._core.kept_pages()
    with ouro.Engine(model, background=False, max_cache_bytes=pages(model, 133)) as engine:
        assert engine.submit(ids, max_new_tokens=4, eos_token_id=[]).result().token_ids == expected
        assert engine.stats.cache_bytes + model._core.kept_pages() == kept
    assert model._core.kept_pages() == kept


def test_threads_that_share_kept_pages_take_turns():
    """Whoever comes second is given the rows behind those of the first, or is told that there are none."""
    model, ids = ouro.load("ouro-tiny"), np.arange(1, 90, dtype=np.int32)
    whole = model.trace(ids.tolist()).states[:, 0]

    def run(kept, n):
        return model._core.trace([ids[:n]], 4, 0, 512, None, None, kept)[0][:, 0]

    for _ in range(8):
        kept = ouro._core.Kept(model._core, 89, 4)
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.submit(run, kept, 40), threads.submit(run, kept, 89)
            rows = second.result()
            np.testing.assert_array_equal(rows, whole[:, 89 - rows.shape[1] :])
            if rows.shape[1] == 49:
                np.testing.assert_array_equal(first.result(), whole[:, :40])
            else:
                with pytest.raises(ValueError, match="sequence 0 has 40 tokens"):
                    first.result()
