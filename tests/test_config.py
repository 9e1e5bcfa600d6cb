"""Bad input: one clear error that names the value and the mend, before any training; the command line."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest
from tiny_run import tiny_config

from cero_jax import run as runs
from cero_jax.command_line import from_command_line
from cero_jax.config import AllocatorConfig
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.rope import RopeScaling
from cero_jax.run_directory import open_run_dir
from cero_jax.sampler import SamplerConfig
from cero_jax.saved_config import check_saved_as_it_is, from_json, to_json
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tasks.dataset import Dataset
from cero_jax.warm_start import WarmStartConfig

ROOT = Path(__file__).parent.parent
CHAIN_SUM = str(ROOT / "configs/chain_sum.py")


def with_allocator(**changes):
    return {"allocator": dataclasses.replace(tiny_config("").allocator, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_allocator(total_budget=1, num_epochs=1), r"total_budget=1 is smaller than one group of 2"),
        (with_allocator(total_budget=10, num_epochs=8), r"total_budget=10 over num_epochs=8 leaves less than"),
        (with_allocator(min_group=9), r"min_group=9 must lie in 1..max_group=8"),
        (with_allocator(max_group=17), r"max_group=17 must be at most learner.rows_per_step=16"),
        (with_allocator(total_budget=2**31, num_epochs=1), r"total_budget=2147483648"),
        ({"sampler": SamplerConfig(temperature=0)}, r"temperature=0 draws the same completion"),
        ({"sampler": SamplerConfig(top_p=0.9)}, r"top_p=0.9, top_k=0 bias the importance ratio"),
        ({"mesh": MeshConfig(fsdp=3)}, r"does not cover the 8 device"),
        ({"mesh": MeshConfig(fsdp=8), "model": ModelConfig(width=12)}, r"parameter \S+ .* does not divide"),
        ({"mesh": MeshConfig(data=4, tensor=2), "sampler": SamplerConfig(slots=6)}, r"slots=6 must be multiples"),
        ({"model": ModelConfig(attention="cudnn")}, r"model.attention='cudnn' needs a GPU of NVIDIA.* cpu: say .auto."),
        ({"model": ModelConfig(attention="splash")}, r"attention='splash' needs a TPU, and this is cpu: say .auto."),
        ({"model": ModelConfig(max_positions=30)}, r"exceed the model's context of 30 tokens: lower task."),
        (with_allocator(num_epochs=0), r"allocator.num_epochs=0 must be at least 1"),
        ({"success_threshold": 0.0}, r"success_threshold=0.0 must be above lowest_reward=0.0"),
        ({"success_threshold": float("nan")}, r"success_threshold=nan must be a finite number"),
        ({"lowest_reward": 1.0}, r"success_threshold=0.5 must be above lowest_reward=1.0"),
        ({"lowest_reward": float("-inf")}, r"lowest_reward=-inf must be a finite number"),
        ({"max_unjudged_steps": 0}, r"max_unjudged_steps=0 must be at least 1"),
        ({"task": Dataset(path="nowhere.jsonl")}, r"nowhere.jsonl"),
        (with_allocator(min_group=1), r"min_group=1"),
        (
            {"dynamic_sampling": True, "learner": LearnerConfig(rows_per_step=16, advantage="posterior")},
            "which teach under learner.advantage=posterior",
        ),
        (
            {"dynamic_sampling": True, "learner": LearnerConfig(rows_per_step=16, steps_per_batch=2)},
            "needs learner.steps_per_batch=1",
        ),
    ],
)  # fmt: skip
def test_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        runs.start(tiny_config(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question": "1 + 1", "answer": "#### 2"}', '{"question": '], r"rows.jsonl:2"),
        (['{"question": "1 + 1", "answer": "#### 2"}', '{"question": "2"}'], r"rows.jsonl:2.*answer"),
        ([], r"rows.jsonl"),
        (
            ['{"question": "' + "long " * 20 + '", "answer": "1"}'] * 2,
            r"all 1 train prompts are longer than max_prompt_tokens=32: raise it",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as caught:
        runs.start(tiny_config(tmp_path / "run", task=Dataset(path=str(path), max_prompt_tokens=32, num_heldout=1)))
    assert "\n" not in str(caught.value)


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write to the work directory .*choose another --work-dir"):
        runs.start(tiny_config(tmp_path / "file" / "run"))


def test_what_is_compiled_is_kept_beside_the_runs_or_where_the_environment_says(tmp_path, monkeypatch):
    config, given = tiny_config(tmp_path / "run"), os.environ["JAX_COMPILATION_CACHE_DIR"]
    open_run_dir(config)
    assert jax.config.jax_compilation_cache_dir == given
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        open_run_dir(config)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", given)


def test_overrides_from_the_command_line():
    args = [CHAIN_SUM, "--allocator.name=uniform", "--seed=3", "--task.wrong-share=0.2", "--learner.rows_per_step=16"]
    config = from_command_line(args)
    assert (config.allocator.name, config.seed, config.task.wrong_share) == ("uniform", 3, 0.2)
    assert config.learner.rows_per_step == 16
    assert config.run_dir.name == "chain_sum-uniform-3"


def run_train(*args):
    return subprocess.run([sys.executable, ROOT / "train.py", *args], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("--learner.learnin-rate=1", "--learner.learning-rate"),
        ("--alocator.name=uniform", "--allocator.name"),
        ("--learner.lr=1", "--learner.learning-rate"),
        ("--learning-rate=1", "--learner.learning-rate"),
        ("--budget=100", "--allocator.total-budget"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_names(given, nearest):
    with pytest.raises(SystemExit, match=f"^error: no field {given.partition('=')[0]}; nearest: .*{nearest}"):
        from_command_line([CHAIN_SUM, given])


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": -1.0}, {"learning_rate": float("nan")}, {"adam_b1": 2.0}, {"clip_low": -1.0}, {"kl_coef": -1.0},
     {"max_grad_norm": 0.0}, {"final_learning_rate_share": -2.0}, {"warmup_share": 1.0}, {"adam_eps": 0.0}],
)  # fmt: skip
def test_a_learner_that_cannot_learn_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        LearnerConfig(**changes)


@pytest.mark.parametrize("advantage", ["reward", "posterior", "posterior_normalised"])
def test_groups_of_one_go_with_an_advantage_that_needs_no_group(advantage):
    learner = LearnerConfig(rows_per_step=16, advantage=advantage)
    alone = tiny_config("", learner=learner, **with_allocator(min_group=1))
    alone.check(num_prompts=8)
    with pytest.raises(ValueError, match=f"groups without variance, which teach under learner.advantage={advantage}"):
        dataclasses.replace(alone, dynamic_sampling=True).check(num_prompts=8)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        tiny_config("", seed=-1)


def test_a_seed_of_more_than_32_bits_is_refused(tmp_path):
    assert tiny_config("", seed=2**32 - 1).seed == 2**32 - 1
    for seed in (2**32, 2**64, 10**400):
        with pytest.raises(ValueError, match=r"seed=\d+ must (not be negative, and below 2\^32|be a whole number)"):
            tiny_config("", seed=seed)
    for seed in (1.0, "3", True, None, float("nan")):
        with pytest.raises(ValueError, match=r"Config: seed=.* must be a whole number"):
            tiny_config("", seed=seed)


ODD = [float("nan"), float("inf"), -float("inf"), 10**400, 1e300, -1e300, "7", "", b"x", [], {}, (1,), True, 2.5, None]
MAY_BE = {  # the odd values that a type has among its own; of bytes, lists, objects and what is beyond float32: none
    int: [], float: [2.5], bool: [True], str: ["7", ""],
}  # fmt: skip


@pytest.mark.parametrize("name", ["", "allocator", "model", "sampler", "learner", "warm_start", "evaluation", "mesh"])
def test_a_setting_of_another_type_or_beyond_all_bounds_is_one_line(name):
    """Each field with each odd value: refused by name, or of the field's own type."""
    config = tiny_config("")
    settings = getattr(config, name) if name else config
    hints, refused = typing.get_type_hints(type(settings)), 0
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        kinds = [kind, *typing.get_args(kind)]
        fine = [value for each in kinds for value in MAY_BE.get(each, ())] + [None] * (type(None) in kinds)
        for value in ODD:
            if any(type(value) is type(each) and value == each for each in fine):
                continue
            if field.name == "sliding_layers" and value == (1,):
                continue
            with pytest.raises(ValueError, match=rf"{field.name}.* must be ") as caught:
                dataclasses.replace(settings, **{field.name: value})
            assert "\n" not in str(caught.value)
            refused += 1
    assert refused > 10 * len(dataclasses.fields(settings))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (ModelConfig, "num_layers", 10**9), (ModelConfig, "width", 2**23), (ModelConfig, "rope_base", 0.0),
        (ModelConfig, "sliding_rope_base", 0.5), (ModelConfig, "norm_eps", 0.0), (ModelConfig, "max_positions", 0),
        (ModelConfig, "query_pre_attn_scalar", 0.0), (ModelConfig, "norm_offset", 1e9),
        (LearnerConfig, "rows_per_microbatch", 0), (LearnerConfig, "least_advantage", -1.0),
        (LearnerConfig, "rows_per_step", 10**9), (WarmStartConfig, "num_steps", -1), (EvaluationConfig, "rows", 10**9),
        (WarmStartConfig, "learning_rate", 0), (AllocatorConfig, "tau", 0), (AllocatorConfig, "explore", 1.5),
        (AllocatorConfig, "discount", 1e-300),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_named(kind, setting, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: {setting}=\S+ must be >= "):
        kind(**{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"factor": 0}, "factor=0 must be >= 1e-06"), ({"factor": "8"}, "factor='8' must be a finite number"),
     ({"factor": 8.0, "low_freq_factor": 4.0}, "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
     ({"factor": 8.0, "original_max_positions": 0}, "original_max_positions=0 must be >= 1")],
)  # fmt: skip
def test_a_rope_scaling_that_divides_by_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling("llama3", **settings)


@pytest.mark.parametrize(
    "wrong",
    [{"max_prompt_tokens": 0}, {"max_prompt_tokens": 10**9}, {"max_prompt_tokens": 12.0}, {"num_heldout": "3"},
     {"heldout_paths": ["a"]}, {"heldout_paths": "a"}, {"path": None}, {"verifier_seconds": float("nan")},
     {"verifier_seconds": float("inf")}, {"verifier_memory_mb": 10**12}, {"chat": "yes"}, {"system": 7}],
)  # fmt: skip
def test_a_setting_of_a_data_set_that_cannot_be_is_named(wrong):
    with pytest.raises(ValueError, match=rf"Dataset: {next(iter(wrong))}=.* must be "):
        Dataset(**{"path": "rows.jsonl"} | wrong)


def test_an_unknown_dtype_is_refused():
    done = run_train(CHAIN_SUM, "--model.compute-dtype=bf16")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "bfloat16" in done.stderr


def test_help_lists_every_field_with_its_units():
    done = run_train(CHAIN_SUM, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--allocator.total-budget" in text
    assert "Rollouts of the whole run" in text


def test_bad_input_is_one_line_and_not_a_traceback(tmp_path):
    given = (
        "--allocator.total-budget=2",
        "--allocator.num-epochs=1",
        "--allocator.min-group=4",
        "--allocator.max-group=8",
    )
    done = run_train(CHAIN_SUM, f"--work-dir={tmp_path}", *given, "--learner.rows-per-step=8")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: allocator.total_budget=2 is smaller than one group")
    assert run_train("configs/nothing.py").stderr.startswith("error: no config file configs/nothing.py; there are: ")
    assert "usage" in run_train().stderr


def test_the_saved_config_is_the_resolved_one(tmp_path):
    config = tiny_config(tmp_path / "run")
    assert json.loads(json.dumps(to_json(config))) == to_json(config)
    assert to_json(config)["learner"]["rows_per_step"] == 16


@pytest.mark.parametrize(
    "task", [ChainSum(num_prompts=7), Dataset(path="a.jsonl", heldout_paths=("b", "c"), system="s")]
)
def test_a_saved_config_is_read_back(tmp_path, task):
    scaling = RopeScaling("llama3", 8.0)
    config = tiny_config(tmp_path / "run", task=task, model=ModelConfig(rope_scaling=scaling, sliding_layers=(0,)))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    for broken, why in (
        ({}, "not the config of a run of this version"),
        ([], r"\[\] is not the config of a run"),
        (to_json(config) | {"learner": {"learning_rate": "high"}}, "learning_rate='high' must be a finite number"),
        (to_json(config) | {"seed": None}, "seed=None must be a whole number"),
        (to_json(config) | {"no_such": 1}, "not the config of a run of this version"),
        (
            to_json(config) | {"task": {"class": {"name": "Other", "module": "cero_jax.data"}}},
            "class Other .* not found",
        ),
        # a config.json names classes of settings, and nothing else is called
        (to_json(config) | {"task": {"class": {"name": "system", "module": "os"}, "command": "true"}}, "no dataclass"),
    ):
        with pytest.raises(ValueError, match=why):
            from_json(broken)


@dataclasses.dataclass(frozen=True)
class Odd:
    """A task whose settings JSON cannot give back."""

    setting: object

    def build(self, seed, tokenizer=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({1: "x"}, r"task.setting=\{1: 'x'\} cannot be read back"),
        ([1, 2], r"task.setting=\[1, 2\] cannot be read back"),
        (len, "cannot be saved as JSON"),
        (((1, 2), (3, 4)), None),
        (None, None),
    ],
)
def test_a_setting_that_would_be_read_back_as_another_is_refused(tmp_path, setting, message):
    config = tiny_config(tmp_path / "run", task=Odd(setting))
    if message is None:
        assert from_json(json.loads(json.dumps(to_json(config)))) == config
        check_saved_as_it_is(config)
    else:
        with pytest.raises(ValueError, match=message):
            check_saved_as_it_is(config)


def test_a_class_inside_a_function_cannot_be_found_again(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Local(ChainSum):
        pass

    with pytest.raises(ValueError, match=r"Local cannot be read back .* at the top of its file"):
        check_saved_as_it_is(tiny_config(tmp_path / "run", task=Local()))


@pytest.mark.parametrize("task", [ChainSum, "chain_sum", None])
def test_a_task_is_an_instance_of_a_dataclass_that_builds(task):
    with pytest.raises(ValueError, match="must be a dataclass of settings with a method build"):
        tiny_config("", task=task)


def test_an_allocator_s_name_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"allocator.name='sero' is none of cero, uniform"):
        runs.start(tiny_config(tmp_path / "run", **with_allocator(name="sero")))


def test_a_config_file_that_was_edited_is_read_again(tmp_path):
    path, text = tmp_path / "mine.py", Path(CHAIN_SUM).read_text()
    path.write_text(text)
    assert from_command_line([str(path)]).name == "chain_sum"
    path.write_text(text.replace('name="chain_sum"', 'name="edited"'))
    assert from_command_line([str(path)]).name == "edited"
