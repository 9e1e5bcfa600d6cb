"""The supervised step against direct computations; its result in the cache."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learner import CONFIG, LIMIT, PLAIN, VOCAB, drawn, log_probs_of, make_batch, one_device, params

from cero_jax.learner import make_optimizer
from cero_jax.optimizer import make_stepper
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.warm_start import WarmStartConfig, _imitate, make_supervised_step, read_cache, write_cache


def test_supervised_steps_lower_the_mean_negative_log_likelihood():
    batch = make_batch()
    stepper = make_stepper(CONFIG, VOCAB, make_optimizer(PLAIN), one_device())
    step = make_supervised_step(CONFIG, stepper, one_device())
    state = stepper.init(jax.tree.map(jnp.copy, params()))
    log_probs = log_probs_of(params(), CONFIG, batch, temperature=1.0, chunk=LIMIT)
    losses = []
    for _ in range(20):
        state, loss = step(state, batch, np.float32(1e-2))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(-np.asarray(log_probs, np.float64)[drawn(batch)].mean(), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1


def test_a_loss_that_is_no_number_is_refused_before_it_is_cached():
    task, config = ChainSum(num_prompts=8, num_heldout=4).build(0), WarmStartConfig(num_steps=2, rows_per_step=4)
    step = lambda state, batch, rate: (state, jnp.float32(np.nan))  # noqa: E731
    with pytest.raises(ValueError, match=r"loss is nan after 2 steps: lower warm_start.learning_rate=0.001"):
        _imitate(config, step, None, task, seed=0, max_tokens=25)


@pytest.mark.parametrize("changes", [{"num_steps": -1}, {"rows_per_step": 0}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=f"WarmStartConfig: {next(iter(changes))}="):
        WarmStartConfig(**changes)


def test_a_cached_warm_start_is_read_back_and_a_damaged_one_is_put_aside_with_a_word(tmp_path, capsys):
    cached, kept = tmp_path / "warm_start-1", {"layers": {"q": jax.random.normal(jax.random.key(0), (50, 40))}}
    assert read_cache(cached, kept) is None
    write_cache(cached, kept)
    write_cache(cached, kept)  # by a run beside this one, which was first
    assert [path.name for path in tmp_path.iterdir()] == ["warm_start-1"]
    shutil.copytree(cached, tmp_path / "fine")

    def flip(path):
        file = max((each for each in path.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    damages = flip, lambda path: shutil.rmtree(path / "1/state"), lambda path: shutil.rmtree(path / "1")
    for number, damage in enumerate(damages, 1):
        found = read_cache(cached, kept)
        assert found is not None
        np.testing.assert_array_equal(found["layers"]["q"], kept["layers"]["q"])
        damage(cached)
        capsys.readouterr()
        assert read_cache(cached, kept) is None
        assert not cached.exists()
        said = capsys.readouterr().err
        assert "damaged" in said
        assert f"put aside as {tmp_path}/put_aside/warm_start-1" in said
        assert len(list((tmp_path / "put_aside").iterdir())) == number
        shutil.copytree(tmp_path / "fine", cached)
