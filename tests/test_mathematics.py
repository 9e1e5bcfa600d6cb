r"""Mathematical answers through the pool: equal ones are right in every form; cheats and monsters never are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cero_jax.rewards import STATUSES
from cero_jax.rewards.mathematics import beyond_bounds, read_answer, read_gold
from cero_jax.rewards.pool import Pool

READ = [
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{5}, no: \boxed{ 72 }.", "72"),
    (r"\boxed{\text{a} \{1, 2\}}", r"\text{a} \{1, 2\}"),
    (r"\fbox{3}", "3"),
    ("x\n#### 72\nQ: 3", "72"),
    (r"#### 5 \boxed{6}", "6"),
    ("The final answer is $x=5$. I hope it is right.", "x=5"),
    ("The answer is 42.", "42"),
    ("**Answer:** 42", "42"),
    ("thus $1$ and $n^2$ it is", "n^2"),
    (r"\boxed{7", None),
    (r"\boxed{}", None),
    (r"\boxed{7} and \boxed{", None),
    ("it is 7", None),
    ("", None),
    (r"\boxed{1}" + " " * 5000, None),  # too far from the end to be searched
]

RIGHT = [
    (r"\frac{1}{2}", ["0.5", r"\dfrac12", "1/2", r"\frac{2}{4}", r"\frac{1}{2}\text{ cm}", r"50\%"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)", r"(3,\frac{\pi}{2})"]),
    (r"\{1, 2, 3\}", ["1, 3, 2", r"\{3,2,1\}"]),
    ("(-1, 3]", [r"\left(-1,3\right]", "x \\in (-1, 3]"]),
    (r"(-\infty, 2) \cup (2, \infty)", [r"(2, \infty) \cup (-\infty, 2)"]),
    (r"2\sqrt{3}", [r"\sqrt{12}", r"\frac{6}{\sqrt{3}}"]),
    ("x^2 + 2x + 1", ["(x+1)^2", "1 + 2x + x^2"]),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", [r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}"]),
    ("11\\sqrt{2}", ["\\sqrt{242}"]),
    ("3 + 4i", ["4i + 3"]),
    ("1,234", ["1234", "1234.0"]),
    (r"10,\!080", ["10080", "10,080"]),
    (r"\$32,\!348", ["32348", r"\$32,348"]),
    (r"\text{(C)}", ["C"]),
    ("p - q", ["-q+p"]),
    ("#### 18", ["18", "18.00", r"\$18"]),
    ("27.0", ["27"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}"]),
    (r"x \ge 2", [r"[2, \infty)", r"2 \le x"]),
]

# What a policy that does not know the answer might try.
CHEATS = [
    "", "x", "0=0", "1=1", "x=x", "y", "?", r"\text{True}", "True", r"\emptyset", r"\{\}", "()", r"\infty",
    r"\mathbb{R}", r"\text{nan}", "0/0", r"\frac{0}{0}",
    "1/0", r"\frac{1}{0}", r"1,2,3,4,5,6,7,8,9", r"x \in \mathbb{R}",
    r"x \neq 0",
    r"\int f", "a=b=c", "x<x+1", r"\lim_{x\to 0}", r"\pm", r"\text{the answer}", "answer", "gold", r"\cdot", "{}", "[]",
    r"\boxed{}", "none", "ERROR", "-", "+", "=", "!", ".", r"\\", "%", "1 or 2 or 3 or 4", "0.0000000001",
]  # fmt: skip
GOLDS = ["5", "-3", r"\frac{3}{4}", r"2\sqrt{3}", "(1, 2)", "x^2 + 1", r"\{4, 6\}", r"[2, \infty)", r"\text{Evelyn}",
         r"90^\circ", "y = 2x + 3", r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", "3 + 4i", r"\pi"]  # fmt: skip

# Every one ends: refused before it is parsed, or killed after a time, which the test makes short.
MONSTERS = [
    "9^9^9", "9**9**9", "9^{9^{9}}", "9^{9^{9^{9}}}", "10^8!", "(10^8)!", "10000000!", "(" * 1000, ")" * 1000,
    "((((" * 90,
    "1+" * 190 + "1", "9" * 10**5, r"\frac{1}{" * 300, r"\sqrt{" * 300 + "2" + "}" * 300, "x^{" * 100 + "2" + "}" * 100,
    r"\binom{10000000}{5000000}", r"\sum_{n=1}^{100000000} n^{n}", r"\prod_{n=1}^{99999999} n", r"\int_0^1 e^{x^x} dx",
    r"\left(" * 100, r"\begin{pmatrix}" * 50, r"\lim_{x \to \infty} x^{x!}", "{" * 399, "1,111" * 70, r"\log" * 90,
    "__import__('os').system('touch HACKED')", "exec('1')", "lambda: 0", "print(1)", "\x00\x00", "\ud800",
    "\u202e5", "5\u200b",
]  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    pool = Pool("cero_jax.rewards.mathematics:mathematics", workers=2)
    yield pool
    pool.close()


@pytest.mark.parametrize(("text", "answer"), READ)
def test_read_answer(text, answer):
    assert read_answer(text) == answer


def test_a_gold_answer_is_read_where_it_is_marked_and_else_whole():
    assert read_gold(r"long solution \boxed{3}") == "3"
    assert read_gold("6/2 = 3\n#### 3") == "3"
    assert read_gold(r"$\frac{1}{2}$.") == r"\frac{1}{2}"


def boxed(pool, pairs):
    return pool.many([("", rf"\boxed{{{given}}}", gold) for gold, given in pairs])


def test_equal_answers_are_right(pool):
    pairs = [(gold, given) for gold, dresses in RIGHT for given in [gold, *dresses] if "####" not in given]
    wrong = [pair for pair, found in zip(pairs, boxed(pool, pairs), strict=True) if found.status != "right"]
    assert wrong == []


def test_what_is_close_is_not_equal(pool):
    pairs = [("2", "2x"), ("12", "1 2"), (r"12", r"1\,2"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("p-q", "q-p")]
    pairs += [
        ("0", "0.0000001"),
        ("-1", "1,-1"),
        ("7", r"7 \text{ or } 8"),
        ("1,234", "1.234"),
        ("1,234", "1,235"),
        (r"\frac13", "0.3334"),
    ]
    assert [pair for pair, found in zip(pairs, boxed(pool, pairs), strict=True) if found.reward] == []


def test_other_answers_and_cheats_are_not_right(pool):
    pairs = [
        (a, b)
        for i, (a, _) in enumerate(RIGHT[:8])
        for j, (_, dresses) in enumerate(RIGHT[:8])
        if i != j
        for b in dresses
    ]
    pairs += [(gold, cheat) for gold in GOLDS for cheat in CHEATS]
    accepted = [pair for pair, found in zip(pairs, boxed(pool, pairs), strict=True) if found.reward]
    assert accepted == []


def test_monsters_end_and_earn_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = Pool("cero_jax.rewards.mathematics:mathematics", seconds=0.3, workers=2)
    asked = [
        ("", dress.format(m), "5") for m in MONSTERS for dress in ("{}", r"\boxed{{{}}}", "The answer is {}", "#### {}")
    ]
    found = pool.many(asked)
    right = [asked[i][1] for i, each in enumerate(found) if each.reward]
    assert {"wrong", "no answer", "too long"} <= {each.status for each in found} <= set(STATUSES)
    assert all("5" in text and len(text) < 20 for text in right)  # 5 with an invisible character beside it
    assert pool("", r"\boxed{5}", "5").reward == 1.0  # it still stands
    assert list(Path(tmp_path).iterdir()) == []  # nothing was executed
    pool.close()


@pytest.mark.parametrize(
    "answer", ["x^8 + x^7 + x^6 + x^5 + 1", "e^{x^2}", "2^{10}", "10^{12}", "20!", r"\frac{\sqrt{5}-1}{2}", "9" * 30]
)
def test_honest_answers_are_within_bounds(answer):
    assert not beyond_bounds(answer)


def test_importing_the_verifier_imports_no_jax():
    code = "import cero_jax.rewards.mathematics, sys; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    ).stdout
    assert not {"jax", "jaxlib", "flax", "train"} & set(json.loads(out))
