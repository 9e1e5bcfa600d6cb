r"""Mathematical answers through the pool: equal ones are right in every form; cheats and monsters never are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cero_jax.rewards import STATUSES
from cero_jax.rewards.mathematics import beyond_bounds, read_answer, read_gold
from cero_jax.rewards.pool import Pool
from cero_jax.tasks.dataset import Dataset, Row

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
    ("thus $1$ or $n^2$ it is", "1, n^2"),
    ("thus $1$ is less than $n^2$", "n^2"),
    ("The answer is:\n\n5\n", "5"),
    ("**Answer:**\n\n**5**", "5"),
    ("Answer:\n\\[\nx = 5\n\\]", "x = 5"),
    ("The answer is\n$$\n5\n$$", "5"),
    (r"The answer is \( 5 \).", "5"),
    ("The answer is 5 because $x=3$", "5"),
    ("The answer is 5 and $x=3$", "5 and $x=3"),
    ("The answer is $5$, since $x=3$", "5"),
    ("The answer is $2x$ or $5$.", "2x, 5"),
    ("The answer is the number $5$.", "5"),
    ("The answer is not $5$", None),
    (r"The answer is $\$36$.", r"\$36"),
    (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
    (r"\boxed 2", "2"),
    (r"\textbf{Answer: 5}", "5"),
    (r"\textbf{Answer:} 5", "5"),
    (r"\boxed{= 5}", "5"),
    ("The answers are $5$ and $7$.", "5, 7"),
    ("so\n5", "5"),
    ("so\n**5 cm**", "5 cm"),
    ("so\n5 cm", "5 cm"),
    ("so\n**no solution**", "no solution"),
    ("so\n(-1, 3]", "(-1, 3]"),
    ("so it has no solution", None),
    ("so\nx = 1 or x = 2", "x = 1 or x = 2"),
    ("The answer is no solution.", "no solution"),
    (r"\boxed{7", None),
    (r"\boxed{}", None),
    (r"\boxed{7} and \boxed{", None),
    ("it is 7", None),
    ("", None),
    (r"\boxed{1}" + " " * 70_000, None),  # too far from the end to be searched
    ("$5$" + " and" * 2000, None),
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
    ("p - q", ["-q+p", "p-q", "p  -  q"]),
    ("x = 0.05", ["0.05", r"5\%"]),
    (r"5 \text{ million}", ["5000000", "5 million people"]),
    ("#### 18", ["18", "18.00", r"\$18"]),
    ("27.0", ["27"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}"]),
    (r"x \ge 2", [r"[2, \infty)", r"2 \le x"]),
    (r"(2, \infty)", ["x > 2", "(2, \u221e)"]),
    (r"\frac{1}{3}", [r"0.\overline{3}", r"0.\bar3", "0.(3)", "0.333333"]),
    (r"\emptyset", [r"\varnothing", "\u2205", r"\{\}"]),
    ("12000", [r"12\,000", "12\u2009000", "12\u00a0000", "12 000", "12,000", "1.2e4", r"1.2 \times 10^4"]),
    (r"\frac{5}{2}", ["2 1/2", r"2\frac12", "2\u00bd", "2.5"]),
    ("-5", ["\u22125", "- 5", "-5."]),
    ("55^\\circ", ["55\u00b0", "55", r"55 \text{ degrees}"]),
    ("5", [r"5\,\mathrm{cm}", r"5~\text{m/s}", r"5 \frac{\text{m}}{\text{s}}", "5 widgets", r"\mathbf{5}", "{5}",
           "\uff15", "\u20ac5", r"5\ "]),
    ("0", ["-0", "0.0"]),
    ("3e5", ["300000", r"3 \times 10^5"]),
    (r"7\pi", ["7\u03c0", "7 pi"]),
    (r"\sqrt{5}", [r"\sqrt5", "\u221a5"]),
    ("x^2", ["x\u00b2"]),
    ("(1, 2)", [r"\langle 1, 2 \rangle"]),
    ("3, 5, 7", [r"\{7, 5, 3\}", r"3, 5 \text{ and } 7"]),
    ("no solution", [r"\text{No solution}"]),
    ("40_9", ["40_{9}", "40"]),
    ("12:30", [r"12:30 \text{ p.m.}"]),
]  # fmt: skip

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


UNREADABLE = [
    "", "$$", "Mary has 1/2 of 3 apples", r"\frac{1}{2", r"\frac{a}", r"\left( 3, \frac{\pi}{2}", r"\unknown{5}", "x^",
    "1 2", "12 00", "12,34,567", r"\frac{1}{0}", "0/0", "?", "9^9^9", "9" * 50, r"\boxed{}", "#### ", "[1,2",
    r"\begin{pmatrix} 1", r"x is \boxed{3}. Then y is \boxed{5}",
]  # fmt: skip


def test_a_gold_answer_that_cannot_be_read_is_an_error_even_for_itself(pool):
    found = pool.many([("", given, gold) for gold in UNREADABLE for given in (gold, r"\boxed{5}")])
    assert {each.status for each in found} == {"error"}
    assert all("the gold answer " in each.extracted for each in found)


def test_a_data_set_names_the_row_of_a_gold_answer_that_cannot_be_read(pool):
    data = Dataset("rows.jsonl", verifier="math")
    rows = [Row(f"rows.jsonl:{i}", [], gold, "all") for i, gold in enumerate([r"\boxed 2", "5", "x^", "5", "x^"])]
    data._check_gold(rows[:2], None, pool.many)
    message = (
        r"rows.jsonl:2, and 1 others: .* fails verifier='math' itself \(the gold answer cannot be parsed as LaTeX\)"
    )
    with pytest.raises(ValueError, match=message):
        data._check_gold(rows, None, pool.many)


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
        (r"\frac13", "0.333334"),
        ("0", r"12\,000"),  # a product to math-verify
        ("12000", "0"),
        ("2", "1 2"),
        (r"\frac32", "2 1/2"),  # 2 * 1/2 or 2 + 1/2
        (".0000672", ".0000671"),
        ("40_9", "40_8"),
        ("east", "seat"),
        ("40", "40_9"),
        ("5", "minus 5"),
        (r"\frac{\pi}{10^6}", "0.000003"),
        (r"\{4, 6\}", "(4, 6)"),
        ("(4, 6)", r"\{4, 6\}"),
        ("1, -2", "1"),
        (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3"),
        ("5", "5 million"),
        ("5", r"5 \text{ million}"),
        (r"5 \text{ million}", "5"),
        ("5", "5!"),
        ("2", "ln 2"),
        ("12:30", "2/5"),
        ("(1,234)", "1234"),
        (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
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
