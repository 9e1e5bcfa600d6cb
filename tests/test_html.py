"""A prompt's history against the allocator itself; the page: what is in it, and that no completion breaks out."""

import base64
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from random_run import DISCOUNT, HOSTILE, N, random_run, start

from cero_jax.allocator.posterior import fitted_prior
from cero_jax.report.curves import seconds, stretches
from cero_jax.report.html import MAX_PROMPTS, MAX_VISITS, as_json, page, page_data, write_page
from cero_jax.report.read_run import MAX_LABELS, allocation, prompt_history, read_samples, replay


@pytest.fixture
def run(tmp_path):
    return random_run(tmp_path)


@pytest.mark.parametrize("rates", [False, True])
def test_the_replayed_posterior_is_the_allocators(tmp_path, rates):
    run, state = random_run(tmp_path, rates)
    visits, posterior = replay(run)
    np.testing.assert_allclose(posterior, [state.alpha, state.beta], rtol=1e-5)  # which is in float32
    assert [sum(v.rollouts for v in each) for each in visits] == state.cumulative_rollouts.tolist()
    assert visits[N - 1] == []
    for each in visits[:-1]:
        assert all(v.unjudged >= 0 and v.correct <= v.rollouts - v.unjudged for v in each)
        assert [v.spent for v in each] == sorted(v.spent for v in each)


@pytest.mark.parametrize("rates", [False, True])
def test_expected_is_what_the_allocator_went_by(tmp_path, rates):
    """The population's prior in the place of the configured one, as the state stood when the epoch was allocated."""
    run, _ = random_run(tmp_path, rates)
    (allocator, state), visits = start(rates), replay(run)[0]
    for number, row in enumerate(run.steps):
        if number % 3 == 0:  # an epoch begins
            seen = [np.asarray(state.alpha) - 0.5, np.asarray(state.beta) - 0.5]
            a, b = fitted_prior(*seen, (0.5, 0.5))
            want = (seen[0] + a) / (seen[0] + a + seen[1] + b)
        for i in row["prompt_ids"]:
            (visit,) = (v for v in visits[i] if v.spent == row["spent"])
            assert visit.expected[0] / sum(visit.expected) == pytest.approx(float(want[i]), rel=1e-4)
        columns = ("num_rollouts", "num_correct", "prompt_ids", "num_evidence")
        state = allocator.update(state, **{name: np.array(row[name], np.int32) for name in columns})


def test_a_prompts_history_to_read(run):
    run, _ = run
    text = prompt_history(run, 0)
    visits, samples = replay(run)[0][0], read_samples(run)[0]
    assert f"prompt 0 (all): {sum(v.rollouts for v in visits)} rollouts in {len(visits)} visits" in text
    assert "gold answer: 7" in text
    shown = HOSTILE.replace("\u2028", "\\u2028")  # a terminal gets no control characters
    assert f"question: question 0 {shown}" in text
    assert text.count(shown) == 1 + min(4, len(samples))
    assert "0 rollouts in 0 visits" in prompt_history(run, N - 1)
    for prompt in (-1, N):
        with pytest.raises(ValueError, match=rf"no prompt {prompt}: its ids are 0 to {N - 1}"):
            prompt_history(run, prompt)


def lines(data: dict, title: str) -> dict[str, list]:
    (picture,) = (each for each in data["runs"][0]["pictures"] if each["title"].startswith(title))
    return picture["lines"]


def test_the_page_holds_everything_and_asks_the_network_for_nothing(run, tmp_path):
    run, _ = run
    write_page([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2  # the data, and the program
    assert not re.search(r"(src|href)=|@import|url\(|fetch\(", page)
    (shown,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(shown) == json.loads(as_json(page_data([run])))
    data = page_data([run])
    (of_run,) = data["runs"]
    assert len(of_run["prompts"]) == of_run["number"] == N
    assert of_run["prompts"][0]["question"] == f"question 0 {HOSTILE}"
    assert len(of_run["prompts"][0]["samples"]) == min(4, len(read_samples(run)[0]))
    assert list(lines(data, "Held-out accuracy")) == ["all", "a", "b"]
    reward = lines(data, "Mean reward")
    assert [len(line) for line in reward.values()] == [12, 11, 11]
    assert reward["format"][0] == [reward[""][1][0], 0.5]
    assert [len(lines(data, title)[""]) for title in ("Entropy", "Norm", "Loss")] == [12, 11, 12]  # without the nan
    assert len(of_run["mechanism"]["ahead"]) == 3  # the fourth epoch may be under way
    assert of_run["settings"]["allocator.discount"] == str(DISCOUNT)
    rollouts = [sum(row["num_rollouts"]) for row in run.steps]
    assert sum(row[3] for row in of_run["population"]) == sum(rollouts)
    assert [sum(row[i] for row in of_run["population"]) for i in (1, 2)] == [N, 1]


def test_the_browser_is_told_to_run_the_pages_own_program_alone(run, tmp_path):
    run, _ = run
    write_page([run], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    (program,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_time_by_phase_is_of_a_step_whatever_a_batch_holds(run):
    run, _ = run
    phases = lines(page_data([run]), "Seconds a step")
    assert {name: line[0][1] for name, line in phases.items()} == {
        "draw": 1.0, "verify": 0.25, "learn": 0.5, "host": 0.125
    }  # fmt: skip
    assert page_data([run])["runs"][0]["seconds"] == {
        "draw": 12.0, "verify": 3.0, "learn": 6.0, "host": 1.5, "evaluate": 3.0
    }  # fmt: skip
    early = [{"kind": "step", "spent": 4, "sample_seconds": 1.0, "learn_seconds": 0.5}]  # of an earlier commit
    assert seconds(early) == {"draw and verify": 1.0, "learn": 0.5, "evaluate": 0}


def test_stretches_keep_the_mean_and_leave_out_what_is_no_number():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    short = stretches([*points, (1000.0, float("nan")), (1001.0, float("inf"))])
    assert len(short) == 60
    parts = np.array_split(np.array(points), 60)
    np.testing.assert_allclose(short, [part.mean(axis=0) for part in parts], rtol=1e-5)
    assert stretches([(1, 2.5)]) == [[1.0, 2.5]]
    assert stretches([]) == []


def test_several_runs_have_names_that_tell_them_apart(run):
    run, _ = run
    other = run._replace(config=run.config | {"seed": 1})
    names = [each["name"] for each in page_data([run, other])["runs"]]
    assert names == ["cero, seed 0", "cero, seed 1"]
    moved = run._replace(path=run.path / "copy")
    (run.path / "copy").mkdir()
    assert [each["name"] for each in page_data([run, moved])["runs"]] == [run.path.name, "copy"]


def test_a_hundred_thousand_prompts_are_a_page_that_a_browser_bears(run):
    """It had 93 MB."""
    run, _ = run
    rng, number = np.random.default_rng(0), 100_000
    steps = tuple(
        run.steps[0] | {"step": i, "epoch": i // 4, "spent": 32_000 * (i + 1), "num_rollouts": [8] * 4000,
        "prompt_ids": np.sort(rng.choice(number - 1, 4000, replace=False)).tolist(),
        "num_correct": rng.binomial(8, 0.5, 4000).tolist(), "num_evidence": [8] * 4000}
        for i in range(8)
    )  # fmt: skip
    texts = tuple(f"question {i} {'x' * 3000}" for i in range(number))
    large = run._replace(
        labels=tuple(f"kind {i % 30}" for i in range(number)),
        steps=steps,
        questions=texts,
        answers=texts,
        known=np.zeros((2, number)),
    )
    (data,) = (whole := page_data([large]))["runs"]
    assert len(page(whole)) < 8e6
    assert data["number"] == number
    assert 0.9 * MAX_PROMPTS <= len(data["prompts"]) <= MAX_PROMPTS
    drawn = np.zeros(number, int)
    for row in steps:
        drawn[row["prompt_ids"]] += 8
    shown = [prompt["id"] for prompt in data["prompts"]]
    assert shown == sorted(set(shown))
    assert (
        np.sort(drawn)[-MAX_PROMPTS // 2] <= np.sort(drawn[shown])[-MAX_PROMPTS // 2]
    )  # the most drawn are among them
    assert all(prompt["rollouts"] == drawn[prompt["id"]] for prompt in data["prompts"])
    assert sum(row[3] for row in data["population"]) == drawn.sum()  # figures are of all
    assert len(data["map"]["labels"]) == MAX_LABELS
    assert sum(data["map"]["of_prompts"]) == pytest.approx(1)


def test_kinds_of_the_fewest_prompts_share_a_row(run):
    run, _ = run
    labels = tuple(f"kind {i}" for i in range(20)) + tuple(f"kind {i}" for i in range(5, 15)) * 2
    where = allocation(run._replace(labels=labels))
    assert where.labels == (*(f"kind {i}" for i in (0, *range(5, 15))), "9 other kinds")
    np.testing.assert_allclose(where.share.sum(axis=0), 1)
    assert where.of_prompts[-1] == pytest.approx(9 / 40)


def test_a_prompts_last_visits_are_shown_and_the_others_counted(run):
    run, _ = run
    steps = tuple(run.steps[0] | {"step": i, "spent": 8 * (i + 1), "prompt_ids": [2], "num_rollouts": [8],
                  "num_correct": [i % 9], "num_evidence": [8]} for i in range(100))  # fmt: skip
    prompt = page_data([run._replace(steps=steps)])["runs"][0]["prompts"][2]
    assert prompt["visited"] == 100
    assert [visit[1] for visit in prompt["visits"]] == [8 * (i + 1) for i in range(100 - MAX_VISITS, 100)]


def test_texts_are_clipped(run):
    run, _ = run
    (clipped,) = {p["question"] for p in page_data([run._replace(questions=("x" * 10**6,) * N)])["runs"][0]["prompts"]}
    assert len(clipped) < 1600


def test_command_line(run, tmp_path):
    command = [sys.executable, "-m", "cero_jax.report", tmp_path]
    done = subprocess.run([*command, "--html", tmp_path / "page.html"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    done = subprocess.run([*command, "--prompt", "0"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("prompt 0 (all): ")
    failed = subprocess.run([*command, "--prompt", "99"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].endswith("no prompt 99: its ids are 0 to 5")


def test_kinds_stand_in_the_order_of_their_numbers(run):
    run, _ = run
    kinds = ["length 13-18", "length 2-4", "length 8-12"]
    score = run.evals[0]["scores"]["all"]
    row = run.evals[0] | {
        "scores": dict.fromkeys([*kinds, "all"], score),
        "accuracy_by_label": dict.fromkeys(kinds, 0.5),
    }
    (data,) = page_data([run._replace(evals=(row,))])["runs"]
    wanted = ["all", "length 2-4", "length 8-12", "length 13-18"]
    assert list(data["scores"]) == wanted
    assert list(data["pictures"][0]["lines"]) == wanted
