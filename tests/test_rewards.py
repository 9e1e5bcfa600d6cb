r"""Verifiers: right answers in every form, wrong ones in none, and no string that breaks or hangs them."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.rewards import Verdict
from cero_jax.rewards.choice import choice, read_choice
from cero_jax.rewards.exact import exact
from cero_jax.rewards.final_number import final_number, read_final_number

# By hand: what a reader would call the final number; None where a reader could not be sure.
READ = [
    ("#### 72", 72),
    ("#### 1,234", 1234),
    ("48/2 = 24\nso 24 + 48 = 72\n#### 72", 72),
    ("#### 72\nQuestion: what is 3 + 4?", 72),  # a base model that goes on
    ("####\n72", 72),
    ("$72", 72),
    ("-$72", -72),
    ("$-72", -72),
    ("US$ 72.50", Fraction(145, 2)),
    ("72.0", 72),
    ("it is 72.", 72),
    ("**72**", 72),
    ("The answer is...72", 72),
    ("-3", -3),
    ("\u22123", -3),
    ("\u20133", -3),
    ("10\u201320", None),  # a range
    ("+5", 5),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("3/4", Fraction(3, 4)),
    ("2 1/2", Fraction(5, 2)),
    ("50%", 50),
    ("1e3", 1000),
    ("72 cm^2", 72),
    ("9 x 8 = 72", 72),
    ("x=72", 72),
    ("first 3, then 4", 4),
    ("1, 2", 2),
    ("H2O and CO2: 72 of them", 72),
    ("答案是72", 72),
    (r"\boxed{72}", 72),
    (r"\boxed{5}, no: \boxed{72} of 99", 72),
    (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{\frac{-3}{4}}", Fraction(-3, 4)),
    (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
    (r"\boxed{1{,}234}", 1234),
    (r"\boxed{1,\!234}", 1234),
    (r"\boxed{\$72}", 72),
    (r"\boxed{72\%}", 72),
    (r"\boxed{72^\circ}", 72),
    (r"\boxed{72 \text{ cm}^{2}}", 72),
    (r"#### \boxed{72}", 72),
    (r"\boxed{5} #### 72", 72),
    ("", None),
    ("no number", None),
    ("####", None),
    (r"\boxed{7", None),  # cut short
    (r"\boxed{}", None),
    # operands are no answers
    ("10-7", None),
    ("2^10", None),
    ("2^{10}", None),
    ("2**10", None),
    ("24*3", None),
    (r"\pi/2", None),
    ("5:30", None),
    ("2020-12-25", None),
    (r"\sqrt{2}", None),
    (r"\frac{x}{4}", None),
    (r"\frac{-3}{-4}", None),
    # nothing to compute with
    ("3/0", None),
    ("1e9999", None),
    ("1" * 101, None),
]

HOSTILE = [
    "9" * 10**6,
    "9^9^9",
    "9**9**9",
    "10^8!",
    "(" * 10**6,
    r"\boxed{" * 20000,
    r"\boxed{" + "{" * 10**6,
    r"\frac{1}{" * 10**5,
    r"\frac{" + "1" * 10**6,
    "1," * 10**6,
    "1,111" * 10**6,
    "1 1/" * 10**6,
    "1/" * 10**6,
    "1e" * 10**6,
    "1e99999999999",
    "$-" * 10**6,
    "#" * 10**6,
    "#### " + "1,111" * 10**5,
    "####" + "\\frac{1}{1}" * 10**5,
    "\x00" * 1000,
    "\ud800",
    "__import__('os').abort()",
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_read(text, number):
    assert read_final_number(text) == number


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_strings_end_at_once_and_earn_nothing(text):
    start = time.perf_counter()
    assert final_number("", text, "#### 72").reward == 0.0
    assert final_number("", text, text).reward in (0.0, 1.0)
    assert time.perf_counter() - start < 1  # a few milliseconds; the rest is for a busy machine


@given(st.text(), st.text())
def test_any_strings_give_a_reward(completion, answer):
    assert final_number("", completion, answer).reward in (0.0, 1.0)


@given(st.text("0123456789.,/$%-+^*eE{}\\ #\nfracboxed", max_size=40))
def test_strings_of_number_characters_give_a_reward(text):
    value = read_final_number(text)
    assert final_number("", text, text).reward == float(value is not None)
    assert final_number("", text, "72").reward == float(value == 72)


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_in_every_form(number, other):
    gold = f"so it is\n#### {number:,}"
    for dress in (f"{number}", f"The answer is {number:,}.", f"#### {number}", rf"\boxed{{{number}}}", f"{number}.00"):
        assert final_number("", dress, gold).reward == 1.0
        assert final_number("", dress, f"#### {other}").reward == float(number == other)


@given(st.fractions(max_denominator=1000))
def test_fractions_compare_exactly(value):
    numerator, denominator = value.numerator, value.denominator
    for dress in (f"{numerator}/{denominator}", rf"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}"):
        assert read_final_number(dress) == value
    assert final_number("", f"{numerator}/{denominator}", f"{3 * numerator}/{3 * denominator}").reward == 1.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_compare_exactly(value):
    assert read_final_number(f"{value:f}") == Fraction(value)
    assert final_number("", f"{value:f}0", f"{value:f}").reward == 1.0
    assert final_number("", f"{value:f}1", f"{value:f}").reward == 0.0


def test_exact():
    assert exact("", " 3489\n", "3489").reward == 1.0
    assert exact("", "3489", "3489 ").reward == 1.0
    assert exact("", "3489.0", "3489").reward == 0.0
    assert exact("", "", "3489").reward == 0.0


def test_a_completion_without_a_number_is_no_answer_and_one_with_another_wrong():
    assert final_number("", "no idea", "#### 72").status == "no answer"
    assert final_number("", "it is 71", "#### 72") == Verdict(0.0, "wrong", "71")
    assert final_number("", "it is 72.0", "#### 72") == Verdict(1.0, "right", "72")
    assert exact("", " ", "72").status == "no answer"
    assert exact("", "7" * 10**6, "72").extracted == "7" * 200


CHOICES = [
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{b}}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{A}, no: \boxed{C}", "C"),
    ("The answer is (D).", "D"),
    ("**Answer:** C", "C"),
    ("Answer: C) seven", "C"),
    ("so\n#### E", "E"),
    ("First A.\nB", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("b", "B"),
    ("**B**", "B"),
    ("The answer is B because it is larger.", "B"),
    ("Answer: B - it is larger", "B"),
    ("The answer is A or B", None),
    (r"\boxed{A, B}", None),
    ("The answer is a number", None),
    ("The answer is Apple", None),
    ("I think that it is hard", None),
    ("", None),
    ("5", None),
    (r"\boxed{", None),
    ("answer is", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_read_choice(text, letter):
    assert read_choice(text) == letter
    assert choice("", text, "B").status == {"B": "right", None: "no answer"}.get(letter, "wrong")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_strings_end_at_once_and_choose_nothing(text):
    start = time.perf_counter()
    assert choice("", text, "B").reward == 0.0
    assert time.perf_counter() - start < 1


@given(st.text(), st.text())
def test_any_strings_give_a_choice_or_none(completion, answer):
    assert choice("", completion, answer).reward in (0.0, 1.0)
