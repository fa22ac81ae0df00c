"""Numbers in texts, against a table made by hand: what a reader takes as the answer."""

import math
from fractions import Fraction as F

import pytest

import dpo_nll
import grpo
import ppo
import reinforce_rloo
import rejection_sampling
from plumbing import is_number, last_number

NONE = [
    "", "none", "The answer is unknown.", "\\frac{}{}",
    "3,5", "1,2345", "10:30", "at 10:30", "2^10", "5^2", "x = 2^{10}", "1.2.3", "8/4/2",
    "12/05/2024", "(1+1)^2", "5/0", "1e999999999", "1e3x", "9" * 5000, "1/" + "9" * 5000,
    "H2O", "m2",
    "\\frac{\\pi}{3}", "x/3", "1/-2", "\\sqrt{2}", "3\\sqrt{2}", "2\\pi", "0.(3)",
]  # fmt: skip
VALUES = {
    # Plain, in sentences and after marks
    "42": 42, "It is 42.": 42, "The answer is 42!\n": 42, "#### 1,000": 1000, "\\boxed{72}": 72,
    "72 (seventy-two)": 72, "3 and 4.": 4, "(3, 5)": 5, "7, then 42.": 42, "06\n633": 633,
    "13 633": 633, "007": 7, "7.0": 7, "x=042": 42, "12 / 4 = 3": 3, "x^2 = 9": 9, "-0": 0,
    "**72**": 72, "Answer: 72\n\n": 72, "\uff15": 5, "12345678901234567891": 12345678901234567891,
    # Decimals and exponents, exactly
    "3.50": F(7, 2), "0.1": F(1, 10), "It is .5": F(1, 2), "1.234": F(1234, 1000), "1e3": 1000,
    "2e-3": F(1, 500), "1E+2": 100, "1.5e3": 1500, "10^3": 1000, "10^{-2}": F(1, 100),
    "2 x 10^3": 2000, "2*10^3": 2000, "1.5 \\times 10^{3}": 1500, "3 \\cdot 10^2": 300,
    "1.5\u00d710\u00b3": 1500, "10**3": 1000,
    # Thousands
    "$1,234.50": F(2469, 2), "100,000,000": 10**8, "1,00,000": 100000, "1'234": 1234,
    "1\u2019234": 1234, "1_000": 1000, "1{,}234": 1234, "1\\,234": 1234, "12\u202f345": 12345,
    "12\u00a0345": 12345, "1.234.567": 1234567, "1.234,56": F(123456, 100),
    # Signs: a hyphen behind a word or number is none
    "-5": -5, "The answer is \u22125.": -5, "is \u20135": -5, "is\n-5": -5, "(-5)": -5,
    "**-5**": -5, "\\boxed{-5}": -5, "= - 5": -5, "a - -5": -5, "x = -.5": F(-1, 2), "+5": 5,
    "10 - 5": 5, "10-12": 12, "10\u201312": 12, "so - 5": 5, "step-3": 3, "x = 10-3 = 7": 7,
    "(2)-3": 3, "50%-60": 60,
    # Currencies and units
    "$5": 5, "-$5": -5, "$-5$": -5, "-\\$5": -5, "\u20ac 5": 5, "-\u20ac5": -5, "USD42": 42,
    "42%": 42, "50\u00a0%": 50, "12cm": 12, "12 cm": 12, "4th": 4, "12 m^2": 12,
    "12 m\u00b2": 12, "12 m2": 12, "7 H2O": 7,
    # Fractions
    "3/4": F(3, 4), "3 / 4": F(3, 4), "So it is 3/4.": F(3, 4), "-1/2": F(-1, 2),
    "\u22121/2": F(-1, 2), "\\frac{3}{4}": F(3, 4), "-\\frac{1}{2}": F(-1, 2),
    "\\dfrac{1}{2}": F(1, 2), "1 3/4": F(7, 4), "\u00bd": F(1, 2), "1\u00bd": F(3, 2),
    "\u2153": F(1, 3), "1,000/3": F(1000, 3), "6/3": 2, "\\frac12": F(1, 2),
    "-5\\frac12": F(-11, 2), "\\cfrac{1}{2}": F(1, 2),
    # As LaTeX and other scripts write them
    "12,\\!345": 12345, "5 \\text{ cm}^2": 5, "5 \\mathrm{m}^{2}": 5, "90^\\circ": 90,
    "90^{\\circ}C": 90, "\\boxed{\\text{7}}": 7, "{-}5": -5, "-{5}": -5, "-(5)": -5,
    "2 X 10^3": 2000,
    "\u7b54\u6848\u662f42\u4e2a": 42, "\u0661\u066c\u0662\u0663\u0664": 1234,
    "\u0661\u0662\u066b\u0665": F(25, 2),
    # On a line of its own, whatever the line before it ends with
    "The answer is\n5": 5, "0+5+1=0A\n6648": 6648, "Step 2:\n42": 42, "1.\n42": 42, "10,\n5": 5,
    "7/\n5": 5, "USD\n42": 42, "costs $\n5": 5, "so -\n5": 5, "x^\n5": 5, "5^\n3": 3,
    # An ellipsis is no decimal point
    "The answer is...5": 5, "12...15": 15,
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_the_last_number_of_a_text(text):
    """By itself, and behind other numbers and words."""
    value = last_number(text)
    assert value == VALUES[text] and isinstance(value, F)
    assert last_number("First 3 + 8 = 11; then: " + text) == VALUES[text]


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:20])
def test_a_text_without_a_clear_number(text):
    assert last_number(text) is None


def test_a_clear_number_that_is_not_the_last_does_not_count():
    """Else an answer at which nobody arrived would be right."""
    for text in ("72, or 3,5", "72 at 10:30", "72 is 2^10", "72 5/0"):
        assert last_number(text) is None


NUMBERS = [
    5, 0, -3, 12.0, -3.5, 1e22, 1e-7, 10**30, "5", "-5", "+5", " 7 ", "7\n", "1,200", "-1,234.50",
    ".5", "3.50", "1e3", "1e999", "2e-3", "\u22125", "\uff15", "1,00,000", "1'234",
]  # fmt: skip
NO_NUMBERS = [
    True, False, None, [2], {"a": 1}, math.nan, math.inf, -math.inf, "nan", "inf", "-Infinity",
    "", " ", "abc", "True", "1/2", "1 1/2", "\u00bd", "\\frac{1}{2}", "$3", "-$3", "50%", "12 cm",
    "12cm", "so #### 3", "3 4", "3,5", "1,2345", "7.", "10:30", "1e99999", "9" * 5000, "x", "2^10",
    "72 apples", "\\boxed{5}", "5!", "--",
]  # fmt: skip


@pytest.mark.parametrize("answer", NUMBERS, ids=str)
def test_one_number_and_nothing_else(answer):
    assert is_number(answer) is True


@pytest.mark.parametrize("answer", NO_NUMBERS, ids=lambda answer: str(answer)[:20])
def test_what_is_not_one_number(answer):
    """Beyond 10^4000 nothing is read; 1e999 is, though no float holds it."""
    assert is_number(answer) is False


SCRIPTS = [grpo, ppo, reinforce_rloo, dpo_nll, rejection_sampling]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_verifier_of_a_script(script):
    """It compares exactly: no float is between the text and the answer."""
    right = [
        ("The answer is 1,234.50.", "1234.5"), ("\u22125", -5), ("-$5", "-5.0"), ("1/2", 0.5),
        ("12345678901234567891", "12,345,678,901,234,567,891"), ("1e999", "1e999"),
    ]  # fmt: skip
    wrong = [
        ("5", "-5"), ("10-5", "-5"), ("no number", "0"), ("", 0),
        ("12345678901234567890", 12345678901234567891),
        ("3,5", "5"), ("5 or 6", "5"), ("1/3", 0.3333333333333333), ("1e999", "1e998"),
    ]  # fmt: skip
    for pairs, value in ((right, 1.0), (wrong, 0.0)):
        texts = [text for text, _ in pairs]
        rows = [{"answer": answer} for _, answer in pairs]
        assert script.verifier([""] * len(pairs), texts, rows) == [value] * len(pairs)
