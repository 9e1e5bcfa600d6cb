"""Hostile strings through every verifier, gold answers against each other: benchmarks/fuzz.py, made small."""

import os
from pathlib import Path

import fuzz
import pytest

from cero_jax.rewards.pool import Pool

GOLDS = {  # in the shape of GSM8K's, AIME's, AMC's and MATH-500's
    "final_number": ["48/2 = <<48/2=24>>24\n#### 72", "#### 1,234", "#### -5", "204", "033", "27.0"],
    "math": ["#### 72", "033", "27.0", r"\left( 3, \frac{\pi}{2} \right)",
             "p - q", r"\frac{14}{3}", "9", r"\text{Evelyn}",
             r"6 - 5i", r"\left(-\infty, 5\right]", r"\begin{pmatrix} -7 \\ 16 \end{pmatrix}", "10\\%", r"3\sqrt{13}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The empty folder in which the tests and the pool's workers run: a string that is executed makes a file there."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("folder")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def pool(folder):
    pool = Pool(fuzz.MATHEMATICS, seconds=0.5)
    yield pool
    pool.close()


def test_a_string_that_is_executed_would_be_seen(folder):
    eval(fuzz.CODE[0]).close()
    assert [path.name for path in folder.iterdir()] == [fuzz.CANARY]
    (folder / fuzz.CANARY).unlink()


@pytest.mark.parametrize("verifier", fuzz.GOLD)
def test_hostile_strings_earn_nothing_and_none_is_executed(pool, folder, verifier):
    status, accepted, longest = fuzz.fuzz(verifier, pool, 2000, seed=1)  # 100,000 in benchmarks/fuzz.py
    assert accepted == []
    assert status.total() == 2000
    assert status["error"] == 0
    assert longest < 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("verifier", GOLDS)
def test_gold_answers_are_right_in_every_way_of_writing_them_and_near_misses_in_none(pool, verifier):
    golds = [fuzz.Gold(answer, answer) for answer in GOLDS[verifier]]
    ways, _, passed, right, wrong = fuzz.check_golds(verifier, pool, golds)
    assert not ways
    assert passed == []
    assert right == len(golds) * len(fuzz.WAYS)
    assert wrong > 3 * len(golds)


def test_the_same_seed_gives_the_same_strings():
    assert list(fuzz.hostile(100, 3)) == list(fuzz.hostile(100, 3)) != list(fuzz.hostile(100, 4))
