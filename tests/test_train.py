"""The whole loop, small: every rollout charged once, nothing compiled after the start, every option of the loop run."""

import dataclasses
import json
import os
import signal
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from tiny_run import FirstDigit, tiny_config

import train
from cero_jax import evaluate
from cero_jax import run as runs
from cero_jax.allocator.base import AllocatorState
from cero_jax.checkpoint import is_key
from cero_jax.data import encode_prompts
from cero_jax.pieces import widths_of
from cero_jax.report.read_run import read_run
from cero_jax.report.summary import summarise
from cero_jax.stop_signal import StopSignal
from cero_jax.tasks.dataset import Dataset

pytestmark = pytest.mark.usefixtures("one_length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")  # one cache of compiled functions and warm starts for all


def rows_of(work_dir):
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def settled(config) -> AllocatorState:
    run, state, cursor = runs.start(config)
    run.close()
    assert cursor.finished
    return state.allocator


DYNAMIC = {"dynamic_sampling": True, "allocator.name": "uniform"}


def config_with(folder, changes):
    config = tiny_config(folder / str(abs(hash(str(changes)))))
    for path, value in changes.items():
        *piece, name = path.split(".")
        if piece:
            inner = dataclasses.replace(getattr(config, piece[0]), **{name: value})
            config = dataclasses.replace(config, **{piece[0]: inner})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"allocator.name": "uniform"},
        {"allocator.name": "cero_dual"},
        DYNAMIC,
        {
            "learner.steps_per_batch": 2,
            "learner.kl_coef": 0.1,
            "truncated": "mask",
            "overlong_tokens": 12,
            "learner.schedule": "cosine",
            "learner.weight_decay": 0.1,
        },
        {"learner.advantage": "rloo", "learner.aggregation": "sequence", "learner.undo_visit_rate": True},
        {"learner.advantage": "posterior", "learner.steps_per_batch": 2},
        {"learner.advantage": "posterior_normalised", "learner.kl_coef": 0.1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_ledger_and_metrics_agree(folder, changes):
    config = config_with(folder, changes)
    assert train.main(config) == 0
    rows = rows_of(config.run_dir)
    steps = [row for row in rows if row["kind"] == "step"]
    drawn, correct = np.zeros((2, 24), int)
    for row in steps:
        assert all(config.allocator.min_group <= n for n in row["num_rollouts"])
        np.add.at(drawn, row["prompt_ids"], row["num_rollouts"])
        np.add.at(correct, row["prompt_ids"], row["num_correct"])
    state = settled(config)
    assert drawn.sum() == steps[-1]["spent"] == int(state.ledger.spent) <= 240
    assert int(state.ledger.reserved) == 0
    np.testing.assert_array_equal(drawn, state.cumulative_rollouts)
    if config.allocator.name != "cero_dual":  # which may leave a rest
        assert drawn.sum() == 240
    assert np.all(correct <= drawn)
    assert rows[-1]["kind"] == "eval"
    rows_agree_with_the_report([row for row in rows if row["kind"] == "epoch"], summarise(read_run(config.run_dir)))
    losses = [row["loss"] for row in steps if "loss" in row]
    assert len(losses) == steps[-1]["optimizer_steps"] > 0
    mismatch = [row["log_prob_mismatch"] for row in steps if "loss" in row]
    if config.learner.steps_per_batch == 1:
        assert max(mismatch) < 1e-5  # on-policy: sampler and learner agree
    else:
        assert max(mismatch) > 1e-5  # the second step of a batch is off-policy


def rows_agree_with_the_report(rows, found):
    """What a run wrote of its epochs as it allocated them, and what is replayed from the counts of its steps."""
    who, groups = found.selection, [row["groups"] for row in rows]
    assert sum(groups) == who.groups
    for name, expected in (("effective_expected", who.effective), ("effective_at_random", who.effective_at_random)):
        assert np.dot(groups, [row[name] for row in rows]) == pytest.approx(expected, rel=1e-4)
    shares = np.array([list(row["prompts_by_success"].values()) for row in rows])
    np.testing.assert_allclose(groups @ shares, who.in_bin_at_random, atol=1e-9)
    assert [row["ahead"] for row in rows] == [row["spent"] - 40 * row["epoch"] for row in rows]
    assert [row["ahead"] for row in rows[1:]] == [found.ahead[row["epoch"] - 1] for row in rows[1:]]


@dataclass(frozen=True)
class OfAllLengths(FirstDigit):
    """The same rows without the dots that make them equally long: 3 to 5 tokens, or 9 to 25."""

    def build(self, seed, tokenizer=None):
        task = super().build(seed, tokenizer)

        def without_dots(prompts):
            questions = [question.replace(".", "") for question in prompts.questions]
            return encode_prompts(questions, prompts.answers, prompts.labels, task.tokenizer)

        return task._replace(train=without_dots(task.train), heldout=without_dots(task.heldout))


def test_nothing_compiles_after_the_first_steps(folder, monkeypatch):
    """Over later epochs, whose allocations and prompts' lengths differ, no jitted function compiles again."""
    monkeypatch.setattr("cero_jax.learner.token_limits", lambda limit: (limit // 2, limit))
    shorter = dataclasses.replace(tiny_config("").sampler, max_completion_tokens=8)
    untaught = dataclasses.replace(tiny_config("").warm_start, num_steps=0)
    task = OfAllLengths(num_prompts=24, num_heldout=8)
    changes = {"task": task, "sampler": shorter, "warm_start": untaught}
    changes["checkpoint_every_steps"] = 2  # the first save compiles too, on several devices: within the first epoch
    config = tiny_config(folder / "compile", **changes)
    run, state, cursor = runs.start(config)
    assert len(widths_of(run.config, run.task.train)) > 1
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    seen, stop = [], StopSignal()
    cursor = run.evaluate(state, cursor)
    for epoch in range(4):
        state, cursor = train.train_epoch(run, state, cursor, stop)
        seen.append(np.asarray(state.num_rollouts).tolist())
        assert cursor.epoch == epoch + 1
        if epoch == 0:
            assert compiled  # the listener hears
            compiled.clear()
    stop.close()
    run.close()
    assert len({str(counts) for counts in seen}) == 4
    assert compiled == []


def test_rows_of_a_file_through_the_same_loop_and_its_policy_measured_alone(folder, tmp_path, capsys, caplog):
    path = tmp_path / "sums.jsonl"
    problems = [{"question": f"What is {a} + {a}?", "answer": f"{a} + {a} = {2 * a}\n#### {2 * a}"} for a in range(20)]
    path.write_text("\n".join(map(json.dumps, problems)))
    config = tiny_config(
        folder / "jsonl",
        task=Dataset(path=str(path), max_prompt_tokens=32, num_heldout=4),
        warm_start=dataclasses.replace(tiny_config("").warm_start, num_steps=0),
        allocator=dataclasses.replace(tiny_config("").allocator, total_budget=64, num_epochs=2),
        sampler=dataclasses.replace(tiny_config("").sampler, max_completion_tokens=8),
        model=dataclasses.replace(tiny_config("").model, max_positions=64),
    )
    assert train.main(config) == 0
    rows = rows_of(config.run_dir)
    assert rows[-1]["spent"] == 64
    assert rows[-1]["example"]["question"].startswith("What is")
    kept = [json.loads(line) for line in (config.run_dir / "samples.jsonl").read_text().splitlines()]
    assert {each["kind"] for each in kept} == {"train", "eval"}
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    heldout = tmp_path / "other.jsonl"
    heldout.write_text('{"problem": "What is 1 + 2?", "answer": "3"}')
    output = tmp_path / "samples.jsonl"
    args = ["--data", str(path), str(heldout), "--question-field=question|problem", "--samples=3", "--rows=16"]
    evaluate.main([str(config.run_dir), *args, f"--output={output}"])
    printed, written = capsys.readouterr().out.splitlines(), output.read_text().splitlines()
    assert [line.split()[:4] for line in printed[-3:]] == [
        ["all", "21", "prompts", "avg@3"],
        ["other", "1", "prompts", "avg@3"],
        ["sums", "20", "prompts", "avg@3"],
    ]
    assert len(written) == 21 * 3
    told = [record.getMessage() for record in caplog.records if record.name == "cero_jax"]
    assert told == []  # the files to measure on are not taken for those that were trained on
    for wrong, message in (
        ("--max-completion-tokens=60", r"max_completion_tokens=60 exceed the model's context of 64 tokens"),
        ("--rows=15", "evaluation.rows=15 and sampler.slots=None must be multiples of data x fsdp = 8"),
        ("--seed=4294967296", "seed=4294967296 must not be negative, and below 2^32"),
        ("--temperature=nan", "temperature=nan must be a finite number"),
        ("--samples=0", "samples=0 must be >= 1"),
        (f"--data={path}.gz", "sums.jsonl.gz: no such file"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(config.run_dir), wrong, f"--output={output}"])
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert "not the directory of a run" in capsys.readouterr().err
    for broken in ("{", "[1]", '{"version": 1}', '{"task": {"class": []}, "allocator": 3}'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path)])
        assert f"error: {tmp_path / 'config.json'}: " in capsys.readouterr().err.splitlines()[-1]


def test_dynamic_sampling_stops_while_it_waits_and_goes_on_to_the_bit(folder, monkeypatch):
    """SIGTERM while live groups wait for others: they are in the checkpoint."""
    config = config_with(folder, DYNAMIC)
    if not (config.run_dir / "report.png").exists():  # of the test of its ledger
        assert train.main(config) == 0
    cut = dataclasses.replace(config, work_dir=str(folder / "cut"))
    collect, waiting = train.collect, []

    def collecting(*args):
        held, full = collect(*args)
        if held.row_mask.any() and not waiting:
            waiting.append(held)
            signal.raise_signal(signal.SIGTERM)
        return held, full

    def starting(config):
        run, state, cursor = runs.start(config)
        waiting.append(state.held)
        return run, state, cursor

    monkeypatch.setattr(train, "collect", collecting)
    assert train.main(cut) == 143
    monkeypatch.setattr(train, "start", starting)
    assert train.main(cut) == 0
    jax.tree.map(np.testing.assert_array_equal, *waiting)
    assert (cut.run_dir / "metrics.jsonl").read_bytes() == (config.run_dir / "metrics.jsonl").read_bytes()


def test_what_cannot_be_learned_from_stops_the_run_saved_and_the_same_command_goes_on(folder, monkeypatch, capfd):
    """First a verifier that fails, then importance ratios that overflow; then both are mended."""
    config = config_with(folder, {"allocator.total_budget": 120, "allocator.num_epochs": 3, "max_unjudged_steps": 2,
                                  "learner.max_skipped_steps": 2})  # fmt: skip
    draw, scored, finish, ends = train.draw, train.verify, runs.Run.finish, []

    def failing(run, *args):
        return draw(run._replace(task=run.task._replace(verify=lambda *asked: 1 / 0)), *args)

    def overflowing(*args):
        return [
            each._replace(batch=each.batch._replace(log_probs=each.batch.log_probs - 1e4)) for each in scored(*args)
        ]

    def finishing(run, state, *args):
        ends.append(jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), state))
        return finish(run, state, *args)

    monkeypatch.setattr(runs.Run, "finish", finishing)
    with monkeypatch.context() as broken:
        broken.setattr(train, "draw", failing)
        assert train.main(config) == 1
    printed = capfd.readouterr()
    assert "ZeroDivisionError: division by zero. They are charged and no evidence" in printed.err
    assert "stopped and saved after 32 rollouts; the verifier judged no rollout of 2 steps in a row" in printed.out
    assert ends[0].allocator.alpha.sum() + ends[0].allocator.beta.sum() < 2 * 24 * 0.5 + 32  # cut ones are failures

    with monkeypatch.context() as broken:
        broken.setattr(train, "verify", overflowing)
        assert train.main(config) == 1
    printed = capfd.readouterr()
    assert "the gradient is not a number: the step is left out, 2 in a row" in printed.err
    assert "the gradient was not a number 2 times in a row (learner.max_skipped_steps)" in printed.out
    jax.tree.map(np.testing.assert_array_equal, ends[1].policy, ends[0].policy)

    assert train.main(config) == 0
    rows = [row for row in rows_of(config.run_dir) if row["kind"] == "step"]
    assert rows[-1]["spent"] == 120
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [1, 2]
    assert all("loss" not in row for row in rows if "skipped_steps" in row)
    assert rows[0]["status"]["error"] > 0
    assert sum(rows[0]["num_evidence"]) == rows[0]["status"]["too long"]
    assert rows[-1]["optimizer_steps"] == sum("loss" in row for row in rows) > 0


def test_the_best_policy_is_kept_and_patience_ends_a_run_which_goes_on_once_it_is_raised(folder, monkeypatch, capfd):
    """Accuracies by hand, best at the second evaluation; the run itself is, to the bit, the one without all that."""
    plain = config_with(folder, {"allocator.name": "uniform"})
    if not (plain.run_dir / "report.png").exists():  # of the test of its ledger
        assert train.main(plain) == 0
    watched = dataclasses.replace(plain.evaluation, keep_best=True, patience=2)
    config = dataclasses.replace(plain, evaluation=watched, work_dir=str(folder / "best"), checkpoint_every_steps=1)
    accuracies, policies, measure = iter([0.2, 0.5, 0.5, 0.4, 0.3, 0.1, 0.0]), [], runs.evaluate

    def by_hand(sample, params, *args):
        policies.append(jax.tree.map(np.asarray, params))
        return measure(sample, params, *args)._replace(accuracy=next(accuracies))

    monkeypatch.setattr(runs, "evaluate", by_hand)
    assert train.main(config) == 0
    evaluations = [row["spent"] for row in rows_of(config.run_dir) if row["kind"] == "eval"]
    assert len(evaluations) == 4
    assert evaluations[-1] < 240
    printed = capfd.readouterr().out
    assert f"the best held-out accuracy, 0.500 after {evaluations[1]} rollouts: checkpoint " in printed
    kept = evaluate.restore_policy(config.run_dir, {}, {}, best=True)
    assert kept.spent == evaluations[1]
    jax.tree.map(np.testing.assert_array_equal, kept.params, policies[1])
    numbers = sorted(int(path.name) for path in (config.run_dir / "checkpoints").iterdir() if path.name.isdigit())
    assert len(numbers) == 3  # the best and the newest two, which are not next to it
    assert numbers[1] > numbers[0] + 1

    assert train.main(config) == 0  # it has ended
    assert (
        "2 evaluations without a better accuracy; to go on, give a larger evaluation.patience" in capfd.readouterr().out
    )
    assert len(policies) == 4
    patient = dataclasses.replace(config, evaluation=dataclasses.replace(watched, patience=None))
    assert train.main(patient) == 0
    steps, alone = ([row for row in rows_of(each.run_dir) if row["kind"] == "step"] for each in (patient, plain))
    assert steps == alone
    assert evaluate.restore_policy(config.run_dir, {}, {}, best=True).spent == evaluations[1]
    with pytest.raises(ValueError, match="no best checkpoint in it: the run has to keep it"):
        evaluate.restore_policy(plain.run_dir, {}, {}, best=True)


def test_a_policy_that_is_not_a_number_is_said_before_a_rollout_is_spent(folder, monkeypatch):
    start = runs.starting_policy

    def broken(*args):
        params = start(*args)
        return params | {"final_norm": jax.numpy.full_like(params["final_norm"], np.nan)}

    monkeypatch.setattr(runs, "starting_policy", broken)
    config = tiny_config(folder / "nan")
    with pytest.raises(FloatingPointError, match=r"the policy is not a number: .* lower learner.learning_rate"):
        train.main(config)
    assert rows_of(config.run_dir) == []
    assert not any((config.run_dir / "checkpoints").iterdir())
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert [path for path in open_files if path.startswith(f"{config.run_dir}/")] == [str(config.run_dir / "lock")]
