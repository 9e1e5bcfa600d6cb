r"""Verifiers: right answers in every form, wrong ones in none, and no string that breaks or hangs them."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cero_jax.rewards import Verdict
from cero_jax.rewards.choice import choice, read_choice
from cero_jax.rewards.exact import exact
from cero_jax.rewards.final_number import final_number, read_final_number, read_gold
from cero_jax.rewards.find import Place, find

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
    # digits in groups
    (r"12\,000", 12000),
    ("12\u2009000", 12000),
    ("12\u00a0000 \u20ac", 12000),
    ("12\u202f000", 12000),
    ("12~000", 12000),
    ("12 000", 12000),
    ("12'000", 12000),
    (r"\boxed{12{\,}345{\,}678}", 12345678),
    (r"\boxed{11,\! 111,\! 111}", 11111111),
    ("12,34,567", 1234567),
    ("1,00,000.50", Fraction(200001, 2)),
    ("1,23", None),  # a decimal, or two numbers
    ("1.234,56", None),
    ("1.234.567", None),
    ("1_000", None),
    # other scripts, currencies, units, fractions
    ("\uff0b\uff15", 5),
    ("\u0663\u0664", 34),
    ("\u22125\u00b0", -5),
    ("\u20ac5", 5),
    ("5 \u00a3", 5),
    ("3\u00bd", Fraction(7, 2)),
    (r"\boxed{\dfrac43}", Fraction(4, 3)),
    (r"\boxed{\frac 9{19}}", Fraction(9, 19)),
    (r"\boxed{137 \frac{1}{2}}", Fraction(275, 2)),
    (r"\boxed{0.1\overline{6}}", Fraction(1, 6)),
    ("0.(3)", Fraction(1, 3)),
    ("0.333...", None),
    ("-0", 0),
    ("- 5", None),  # a bullet or a sign
    (r"\boxed{- 5}", -5),
    ("x = - 5", -5),
    (r"\boxed{\text{negative } 5}", -5),
    (r"\boxed{\text{minus } 5}", None),
    ("The answer is the square root of 5.", None),
    ("The answer is 5 if n is even and 7 otherwise.", None),
    ("The answer is 5, but it may be 7.", None),
    (r"\boxed{3 \times 10^{5}}", 300000),
    ("3 x 10^5", 300000),
    (r"\boxed{5\,\mathrm{cm}}", 5),
    ("5m/s", 5),
    ("72-inch", 72),
    ("**Answer: 72**", 72),
    ("<<60+12=72>>", None),
    ("60 + 12 = <<60+12=72>>72", 72),
    # marked, with a reason behind
    ("The answer is 5 because 3 + 2 are.", 5),
    ("The answer is:\n\n**5**\n\nThere were 7.", 5),
    ("The answer is 5. There were 7", 5),
    ("\\textbf{Answer: 5} apples", 5),
    ("<b>Answer:</b> <b>5</b>", 5),
    ("Ans = 5", 5),
    ("The answer should be 5", 5),
    ("so \u20145", -5),
    ("## Final Answer\n\n5", 5),
    ("#### Step 3\nadd\n#### Final Answer\n5", 5),
    ("<think>\\boxed{3}</think><answer>5</answer> or 7", 5),
    ("The answer is 5.\nThe answer is correct.", 5),
    # one of two, or none of them
    ("The answer is not 5", None),
    ("I get 72, not 73.", None),
    ("The answer is 5 or 7.", None),
    (r"\boxed{5} or \boxed{7}", None),
    (r"\boxed{5}, \boxed{5}", 5),
    ("5 or 7", None),
    (r"\boxed{1, 200}", None),
    (r"\boxed{(1,2)}", None),
    (r"\boxed{x = 5,\; y = 6}", None),
    (r"\boxed{3 + 4 = 7, 7 \cdot 2 = 14}", 14),
    (r"\boxed{3 \text{ hours } 20 \text{ minutes}}", None),
    # operands are no answers
    (r"\boxed{10 - 7}", None),
    ("10 - 7", None),
    (r"\boxed{5 - x}", None),
    (r"\boxed{x^2 + 5}", None),
    (r"\boxed{5x}", None),
    (r"\boxed{2\pi}", None),
    ("2\u03c0", None),
    (r"\boxed{\pm 5}", None),
    (r"\boxed{x \ge 5}", None),
    ("x != 5", None),
    (r"\boxed{5!}", None),
    (r"\boxed{\text{at least } 5}", None),
    (r"\boxed{40_9}", None),
    (r"\boxed{\frac{ x }{ 4 }}", None),
    (r"\boxed{\ln 5}", None),
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

GOLDS = [  # not marked: one number and no more
    ("204", 204),
    ("1,234 apples", 1234),
    (r"\$36", 36),
    ("x = 5", 5),
    *[(two, None) for two in ("1331 and 1728", "5 apples and 3 pears", "3 hours 20 minutes", "1, 2")],
    *[(two, None) for two in ("x = 5, y = 6", "$x = 5$ and $y = 6$", "x_1=5; x_2=6")],
    ("n = 3, so x = 5", 5),
    ("2 + 3 = 5, so 5", 5),
    (r"2\pi", None),
    (r"\frac{\pi}{4}", None),
    ("10^6", None),
    ("12:30", None),
    ("40_9", None),
    (r"\boxed{3} and \boxed{5}", None),
    ("five", None),
    (r"so x is \boxed{3}. Then y is \boxed{5}", None),
    (r"so it is \boxed{\frac{1}{2}}, which is \boxed{0.5}", Fraction(1, 2)),
    (r"\boxed{15\frac{39}{40}} \boxed{\frac{639}{40}}", Fraction(639, 40)),
    ("x is $\\boxed{3}$\n#### 5", 5),
]

FOUND = [
    (r"\boxed{1}, $\boxed{2}$, and \(\boxed{3}\)", Place("1, 2, 3", False)),
    (r"$x = \boxed{1}$ and $y = \boxed{2}$", Place("1, 2", False)),
    (r"\boxed{1}\text{ or }\boxed{2}", Place("1, 2", False)),
    (r"\boxed{1}, no: \boxed{2}", Place("2", False)),
    (r"\boxed{\boxed{2}}", Place("2", False)),
    (r"\boxed 2", Place("2", False)),
    (r"\boxed{1} and \boxed{2", Place("", False)),
    ("#### Sum of both\nThe answer is 5", Place("5", True)),
    ("<answer>\n5\n</answer>", Place("5", False)),
    (r"<answer>\boxed{5}</answer>", Place("5", False)),
    (r"<think>\boxed{3}</think>", None),
    ("the answer to the question would be: 5", Place("5", True)),
    ("**Final Answer**\n\n$$\n5\n$$", Place("$$\n5\n$$", True)),
    ("so the answer is", Place("", True)),
    ("it is 5", None),
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
    r"\boxed{1}, " * 20000,
    r"\boxed1" + "1" * 10**6,
    "answer is" + " " * 10**6,
    "{" + " " * 10**6 + "^",
    "100 " * 10**5,
    "#### a\n" * 10**5,
    "0." + "\u0305" * 10**5,
    r"\mathbf{" * 10**5,
    "<answer>" * 10**5,
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_read(text, number):
    assert read_final_number(text) == number


@pytest.mark.parametrize(("gold", "number"), GOLDS)
def test_a_gold_answer_is_one_number_or_an_error(gold, number):
    assert read_gold(gold) == number
    assert final_number("", "#### 5", gold).status == (
        "error" if number is None else "right" if number == 5 else "wrong"
    )


@pytest.mark.parametrize(("text", "place"), FOUND)
def test_find(text, place):
    assert find(text) == place


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
    assert final_number("", text, f"#### {value}").reward == float(value is not None and len(str(value)) < 100)
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
    *[(f"The answer is:{b}", "B") for b in ("\nB", "\n\n**B**", "\n\n- (B) twelve", "\n> B")],
    ("The answer is **B**.", "B"),
    (r"The answer is \( B \).", "B"),
    (r"Answer: \[ \text{(B)} \]", "B"),
    ("**Answer: (B)** 12", "B"),
    ("### Final Answer\n\nB) twelve", "B"),
    ("The correct option is B.", "B"),
    ("The answer is option (B).", "B"),
    (r"\boxed{\textbf{(B)}\ 12}", "B"),
    ("<answer>B</answer>", "B"),
    ("Answer: \uff22", "B"),
    ("The answer is B because A and C are wrong.", "B"),
    ("The answer is B, not C.", "B"),
    ("Answer: B is correct", "B"),
    ("The answer is A or B", None),
    ("The answer is (A) 5 or (B) 6", None),
    ("Answer: A. 5, B. 6", None),
    ("Answer: [B] twelve", "B"),
    (r"\boxed{B]~,47T)$Y5X}", None),
    ("Answer: A/B", None),
    ("Answer: A B C D", None),
    (r"\boxed{A} or \boxed{B}", None),
    ("The answer is not B", None),
    ("Answer: none of them", None),
    (r"\boxed{A, B}", None),
    ("The answer is a number", None),
    ("The answer is Apple", None),
    *[(nothing, None) for nothing in ("I think that it is hard", "", "5", r"\boxed{", r"\boxed{-B}", "answer is")],
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


@pytest.mark.parametrize("gold", ["B", "(b)", "B. twelve", "#### B", r"\text{(B)}"])
def test_a_gold_choice(gold):
    assert choice("", "Answer: B", gold).status == "right"
    assert choice("", "Answer: C", gold).status == "wrong"


@pytest.mark.parametrize("gold", ["twelve", "A or B", "A, B", "12", "Because", r"\boxed{A}. Then \boxed{B}"])
def test_a_gold_choice_that_is_not_one_letter_is_an_error(gold):
    assert choice("", f"Answer: {gold}", gold).status == "error"
