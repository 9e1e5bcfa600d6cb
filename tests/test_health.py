"""What a run says of its troubles, and when it stops: by hand, over made-up steps."""

import json

import numpy as np
import pytest
from test_rollout import ANSWERS, make_rows, scored_by
from tiny_run import tiny_config

from cero_jax.dynamic_sampling import nothing_held
from cero_jax.health import FIRST_STEPS, SPIKE, Health, at_the_end, deviations, followed, observe, tried_again, trouble
from cero_jax.rewards import NO_ANSWER, TIMED_OUT, TOO_LONG, Verdict

DRAWN = int(make_rows().row_mask.sum())  # 7 rollouts a step, of which one is cut


def raises(question, completion, answer):
    raise RuntimeError("no such table")


def after(health, steps, verifier, metrics=None):
    """What is remembered and told after so many alike; it goes through JSON, as the cursor does."""
    told = []
    for _ in range(steps):
        health, _, texts = observe(health, scored_by(verifier), metrics or {}, ANSWERS)
        health, told = Health(**json.loads(json.dumps(health._asdict()))), told + texts
    return health, told


def test_that_nothing_is_right_is_said_after_the_first_hundreds_and_at_each_doubling():
    wrong = lambda q, c, a: Verdict(0.0, NO_ANSWER) if c == "x" else 0.0  # noqa: E731
    health, told = after(Health(), 200 // DRAWN, wrong)
    assert told == []
    health, told = after(health, 1, wrong)
    assert len(told) == 1
    head, sample = told[0].splitlines()
    steps = 200 // DRAWN + 1
    assert head.startswith(f"nothing was right in {DRAWN * steps} rollouts, the first of the run ({5 * steps} wrong, ")
    assert f"{steps} no answer, {steps} too long): is this the verifier for these gold answers" in head
    assert sample == "  for example prompt 2, wrong: completion 'a', extracted '', gold '3'"
    health, told = after(health, 1100 // DRAWN, wrong)
    assert [text.split()[4] for text in told] == ["406", "805"]
    health, told = after(health, 1, lambda q, c, a: 1.0)
    assert (told, health.since_right, health.ever_right, health.status) == ([], 0, True, {})
    assert at_the_end(health, None) == []
    assert len(at_the_end(Health(since_right=7, status={"wrong": 7}), None)) == 1  # of a short run, all of it
    # and a policy that breaks later
    health, told = after(health, steps, wrong)
    assert "rollouts, since then (" in told[0]
    assert "the policy may be broken: lower learner.learning_rate" in told[0]
    assert at_the_end(health, None)[0].startswith("nothing was right in ")


def test_advice_is_for_what_most_rollouts_came_to():
    _, told = after(Health(since_right=195), 1, lambda q, c, a: Verdict(0.0, TIMED_OUT, "after 3 s"))
    assert "6 timed out" in told[-1]
    assert "raise the verifier's time limit" in told[-1]


def test_a_failing_verifier_is_said_once_and_stops_the_run_after_whole_steps_of_it():
    config = tiny_config("")
    health, told = after(Health(), 2, raises)
    assert len(told) == 1
    assert f"failed on 6 of {DRAWN} rollouts, first on prompt 2: RuntimeError: no such table" in told[0]
    assert (health.failed, health.unjudged_steps, trouble(health, config)) == (12, 2, "")
    stopped, _ = after(health, 1, raises)
    assert "judged no rollout of 3 steps in a row (max_unjudged_steps): mend it" in trouble(stopped, config)
    assert tried_again(stopped, config) == stopped._replace(unjudged_steps=0)
    assert tried_again(health, config) == health
    step = scored_by(raises)  # one of which every row was cut: the verifier was not asked, and is no better for it
    cut = step._replace(truncated=step.plan.row_mask, verdicts=[Verdict(0.0, TOO_LONG)] * len(step.verdicts))
    assert observe(health, cut, {}, ANSWERS)[0].unjudged_steps == 2
    half = lambda q, c, a: raises(q, c, a) if c == "a" else 0.0  # noqa: E731
    assert after(health, 1, half)[0].unjudged_steps == 0


def test_what_others_wrote_is_printed_on_its_line_and_readable_without_a_blank_in_it():
    def failing(question, completion, answer):
        raise RuntimeError("no\n\x1b[2Jtable")

    (told,) = after(Health(), 1, failing)[1]
    assert r"RuntimeError: no \x1b[2Jtable. They are" in told
    long = lambda q, c, a: Verdict(0.0, NO_ANSWER, "答案" * 200 + "\x1b")  # noqa: E731
    _, told = after(Health(since_right=195), 1, long)
    assert "extracted '答案答案" in told[0]
    assert told[0].replace("\n", "").isprintable()


def test_steps_left_out_are_counted_in_a_row_and_stop_the_run():
    config = tiny_config("")
    left_out, moved = {"skipped_steps": 1}, {"loss": 0.1, "grad_norm": 1.0}
    health, told = after(Health(), 9, lambda q, c, a: 1.0, left_out)
    assert (health.skipped_steps, trouble(health, config), len(told)) == (9, "", 9)
    assert "the gradient is not a number: the step is left out, 9 in a row" in told[-1]
    assert after(health, 1, lambda q, c, a: 1.0)[0].skipped_steps == 9  # a step without a gradient says nothing
    assert after(health, 1, lambda q, c, a: 1.0, moved)[0].skipped_steps == 0
    stopped, _ = after(health, 1, lambda q, c, a: 1.0, left_out)
    assert "not a number 10 times in a row (learner.max_skipped_steps): lower " in trouble(stopped, config)
    assert observe(health, scored_by(lambda q, c, a: 1.0), left_out, ANSWERS)[1] == {"skipped_steps": 10}


def test_a_spike_of_the_loss_is_said_and_usual_noise_is_not():
    rng = np.random.default_rng(0)
    spikes, health, step = 0, Health(), scored_by(lambda q, c, a: 1.0)
    for _ in range(3000):
        values = {"loss": float(rng.normal(0.01, 0.02)), "grad_norm": float(rng.lognormal(0, 0.3))}
        health, more, told = observe(health, step, values, ANSWERS)
        spikes += len(more)
    assert spikes == len(told) == 0
    health, more, told = observe(health, step, {"loss": 1.0, "grad_norm": 1.0}, ANSWERS)
    assert list(more["spike"]) == ["loss"]
    assert more["spike"]["loss"] > 30
    assert told[0].startswith("loss 1 is a spike: usual are 0.0")
    again = observe(health, step, {"loss": -1.0, "grad_norm": 500.0}, ANSWERS)  # one does not hide the next
    assert list(again[1]["spike"]) == ["loss", "grad_norm"]


def test_after_a_figure_that_never_moved_another_becomes_usual():
    seen = [0.0, 0.0, 0]
    for _ in range(100):
        seen = followed(seen, 0.0)
    assert deviations(seen, 0.5) > SPIKE
    for _ in range(300):
        seen = followed(seen, 0.5)
    assert deviations(seen, 0.5) < SPIKE


def test_usual_figures_are_running_means():
    seen = [0.0, 0.0, 0]
    values = np.random.default_rng(1).normal(3, 1, 2000)
    assert deviations([3.0, 0.1, FIRST_STEPS - 1], 1e9) == 0
    for number, value in enumerate(values, 1):
        seen = followed(seen, float(value))
        if number == 15:
            assert seen[0] == pytest.approx(values[:15].mean())
    assert abs(seen[0] - 3) < 0.5
    assert abs(seen[1] - np.sqrt(2 / np.pi)) < 0.3  # the mean deviation of a normal
    assert followed([3.0, 0.1, 100], 1e9)[0] == pytest.approx(3 + SPIKE * 0.1 / 50)


def test_what_dynamic_sampling_still_holds_is_said_at_the_end():
    held = nothing_held(8, 2, 3)
    assert at_the_end(Health(), held) == []
    held = held._replace(row_mask=np.arange(8) < 5)
    assert at_the_end(Health(), held) == ["5 rollouts of live groups are left over: they filled no optimiser step"]
