"""A prompt's history against the allocator itself; the page: what is in it, and that no completion breaks out."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cero_jax
from cero_jax.allocator.posterior import fitted_prior
from cero_jax.report.html import page_data, write_page
from cero_jax.report.read_run import prompt_history, read_run, read_samples, replay

N, DISCOUNT = 6, 0.8
HOSTILE = "</script><script>document.title='BROKEN'</script><!-- <b>bold</b> \u2028 ${x} `\\"


@pytest.fixture
def run(tmp_path):
    """A run of random visits, each settled by a real allocator too: the run, and the allocator's last state."""
    rng = np.random.default_rng(0)
    allocator = cero_jax.cero(total_budget=1000, num_epochs=10, discount=DISCOUNT)
    state, rows, samples, spent = allocator.init(N), [], [], 0
    for step in range(12):
        ids = rng.choice(N - 1, 2, replace=False)  # the last prompt is never visited
        rollouts = rng.integers(4, 9, 2)
        evidence = rollouts - rng.integers(0, 3, 2)
        correct = rng.binomial(evidence, 0.4)
        state = allocator.update(state, rollouts, correct, prompt_ids=ids, num_evidence=evidence)
        spent += int(rollouts.sum())
        rows.append(
            {"kind": "step", "step": step, "epoch": step // 3, "spent": spent, "prompt_ids": ids.tolist(),
             "num_rollouts": rollouts.tolist(), "num_correct": correct.tolist(), "num_evidence": evidence.tolist(),
             "live_share": 0.5, "reward": 0.25, "entropy": 1.5}
            | ({"rewards": {"correct": 0.2, "format": 0.5}} if step else {})
        )  # fmt: skip
        samples += [
            {"kind": "train", "spent": spent, "prompt_id": int(i), "completion": HOSTILE, "extracted": "7",
             "status": "wrong", "reward": 0.0, "length": 9} for i in ids
        ]  # fmt: skip
    score = {
        "prompts": 4,
        "accuracy": 0.5,
        "low": 0.2,
        "high": 0.8,
        "pass_at": {"1": 0.5},
        "status": {"right": 2, "wrong": 2},
    }
    rows.append(
        {"kind": "eval", "step": 12, "spent": spent, "accuracy": 0.5, "accuracy_by_label": {"a": 0.4, "b": 0.6},
         "scores": {"all": score}}
    )  # fmt: skip
    config = {
        "name": "x",
        "seed": 0,
        "allocator": {
            "name": "cero",
            "prior": [0.5, 0.5],
            "discount": DISCOUNT,
            "total_budget": 1000,
            "num_epochs": 10,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = {"labels": ["all"] * N, "questions": [f"question {i} {HOSTILE}" for i in range(N)], "answers": ["7"] * N}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples) + '{"kind": "tr')
    return read_run(tmp_path), state


def test_the_replayed_posterior_is_the_allocators(run):
    run, state = run
    visits, posterior = replay(run)
    np.testing.assert_allclose(posterior, [state.alpha, state.beta], rtol=1e-5)  # which is in float32
    assert [sum(v.rollouts for v in each) for each in visits] == state.cumulative_rollouts.tolist()
    assert visits[N - 1] == []
    for each in visits[:-1]:
        assert all(v.unjudged >= 0 and v.correct <= v.rollouts - v.unjudged for v in each)
        assert [v.spent for v in each] == sorted(v.spent for v in each)


def test_expected_is_what_the_allocator_went_by(run):
    """The population's prior in the place of the configured one, as the state stood when the epoch was allocated."""
    run, _ = run
    allocator = cero_jax.cero(total_budget=1000, num_epochs=10, discount=DISCOUNT)
    state, visits = allocator.init(N), replay(run)[0]
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


def test_the_page_holds_everything_and_asks_the_network_for_nothing(run, tmp_path):
    run, _ = run
    write_page(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|@import|url\(|fetch\(", page)
    start = page.index("const run = ") + len("const run = ")
    assert json.JSONDecoder().raw_decode(page, start)[0] == json.loads(json.dumps(page_data(run)))
    data = page_data(run)
    assert len(data["prompts"]) == N
    assert data["prompts"][0]["question"] == f"question 0 {HOSTILE}"
    assert len(data["prompts"][0]["samples"]) == min(4, len(read_samples(run)[0]))
    assert list(data["accuracy"]) == ["all", "a", "b"]
    assert [[len(line) for line in data["parts"].values()], len(data["entropy"])] == [[11, 11], 12]
    assert data["parts"]["format"][0] == [data["reward"][1][0], 0.5]
    assert len(data["mechanism"]["ahead"]) == 3  # the fourth epoch may be under way


def test_texts_are_clipped(run):
    run, _ = run
    (clipped,) = {p["question"] for p in page_data(run._replace(questions=("x" * 10**6,) * N))["prompts"]}
    assert len(clipped) < 1600


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_the_page_in_a_browser(run, tmp_path):
    run, _ = run
    write_page(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(
        page.replace("</html>", "<script>document.querySelector('tr.row').click()</script>")
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*command, tmp_path / "page.html"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>x, cero, seed 0</title>" in dom
    assert dom.count('class="row"') == N
    assert dom.count("<svg") == 6  # accuracy, live, reward, calibration, pace, and the opened prompt's
    assert "&lt;/script&gt;&lt;script&gt;document.title='BROKEN'" in dom
    assert "<b>bold</b>" not in dom.partition("<script>")[0]


def test_command_line(run, tmp_path):
    command = [sys.executable, "-m", "cero_jax.report", tmp_path]
    done = subprocess.run([*command, "--html", tmp_path / "page.html"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    done = subprocess.run([*command, "--prompt", "0"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("prompt 0 (all): ")
    failed = subprocess.run([*command, "--prompt", "99"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].endswith("no prompt 99: its ids are 0 to 5")
