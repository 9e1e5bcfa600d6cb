"""Which prompts are read together: each once, longest first, as many as the bound on memory lets in."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax import model, prefill, sharding
from cero_jax.model import ModelConfig

CONFIG = ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.data())
def test_each_wanted_prompt_is_read_once_at_a_width_that_holds_it(lengths, data):
    lengths = np.array(lengths, np.int32)
    rows = {width: data.draw(st.integers(1, 6)) for width in (8, 20, 40)}
    wanted = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=50)), np.int32)
    reading = prefill.plan(lengths, wanted, rows)
    read = [prompt for chunk in reading.chunks for prompt in chunk.prompts]
    assert sorted(read) == sorted(set(wanted.tolist()))
    assert list(lengths[read]) == sorted(lengths[read], reverse=True)
    for number, chunk in enumerate(reading.chunks):
        assert chunk.rows == rows[chunk.width] >= len(chunk.prompts)
        assert chunk.width == min(width for width in rows if width >= lengths[chunk.prompts].max())
        np.testing.assert_array_equal(reading.chunk[chunk.prompts], number)
        np.testing.assert_array_equal(reading.place[chunk.prompts], np.arange(len(chunk.prompts)))
    assert (reading.chunk < 0).sum() == len(lengths) - len(read)


def test_a_prompt_that_is_longer_than_the_widths_is_refused():
    with pytest.raises(ValueError, match=r"a prompt of 9 tokens is longer than prompt_widths=\(4, 8\)"):
        prefill.plan(np.array([3, 9]), np.array([0, 1]), {4: 1, 8: 1})


def test_what_is_read_is_cut_and_filled_up_to_its_shape():
    tokens = np.array([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 0, 0, 0]], np.int32)
    given, lengths = prefill.inputs(prefill.Chunk(np.array([2, 1]), 3, 4), tokens, np.array([3, 1, 2], np.int32))
    np.testing.assert_array_equal(given, [[5, 6, 0], [4, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(lengths, [2, 1, 1, 1])
    wider, _ = prefill.inputs(prefill.Chunk(np.array([0]), 7, 1), tokens, np.array([3, 1, 2], np.int32))
    np.testing.assert_array_equal(wider, [[1, 2, 3, 0, 0, 0, 0]])


def test_prompts_read_at_once_stay_under_the_bound():
    """As the compiler counts them; a quarter of all where widths differ; a multiple of the devices."""
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    rows = prefill.chunk_rows(CONFIG, (1024,), 10_000, one)[1024]
    shapes = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((rows, 1024), (rows,))]
    read = jax.jit(prefill.read, static_argnums=1).lower(model.abstract_params(CONFIG, 100), CONFIG, *shapes)
    assert 0.5 < read.compile().memory_analysis().temp_size_in_bytes / prefill.BYTES_AT_ONCE < 1.1
    assert prefill.chunk_rows(CONFIG, (16,), 10, one) == {16: 10}
    assert prefill.chunk_rows(CONFIG, (16, 32), 10, one) == {16: 3, 32: 3}
    assert prefill.chunk_rows(CONFIG, (100_000,), 10, one) == {100_000: 1}
    assert prefill.chunk_rows(CONFIG, (16, 32), 10, sharding.make_mesh(sharding.MeshConfig())) == {16: 8, 32: 8}
