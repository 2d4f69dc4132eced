"""Final answers: extracted from response and reference, compared exactly, after the trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from builders.records import said, stored, user
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dagster_project.evaluation.evaluator import Settings, select_questions
from dagster_project.evaluation.final_answers import FinalAnswer, last_number
from dagster_project.evaluation.metrics import NO_LABEL, label
from dagster_project.evaluation.scoring import Scoring
from dagster_project.training.inference.answers import Answer
from dagster_project.training.inference.numbers import number_in

NUMBER = FinalAnswer(final_answer="number")
LETTER = FinalAnswer(final_answer=r"[Aa]nswer is \(?([A-D])\b")


def record(prompt: str, response: str, **more: Any) -> dict[str, Any]:
    return stored(user(prompt), said(response, **more))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays 2 * 3 = <<2*3=6>>6 dollars.\n#### 6", "6"),
        ("#### 1,250", "1250"),
        ("#### $1,250.50", "1250.5"),
        ("#### -3", "-3"),
        ("#### 42 apples, not 7", "42"),
        ("First #### 1, then\n#### 2", "2"),
        ("12 and 3 make 15.", "15"),
        ("It is $18.00", "18"),
        ("It is 1,000,000!", "1000000"),
        ("5, 10, 15", "15"),
        ("10-5=5", "5"),
        ("10 - 15 = -5", "-5"),
        ("pages 10-12", "12"),
        ("-0", "0"),
        ("007", "7"),
        ("3.50", "3.5"),
        ("0.5%", "0.5"),
        ("\\boxed{72}", "72"),
        ("**72**", "72"),
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
        ("#### none of them, 9 of 10", "9"),
        ("#### nothing", None),
        (".5", "0.5"),
        ("It is $.50", "0.5"),
        ("v1.5, or 2...7", "7"),
        ("1e5", "100000"),
        ("2.50E-3 m", "0.0025"),
        ("1e999999999", None),  # 10**999999999 written out would take 1 GB
        ("0e5", "0"),
        ("x = \u22125", "-5"),
        ("10 \u2212 15 = \u22125e\u22121", "-0.5"),
        ("10\u221212", "12"),
        ("10 - 12", "12"),
        ("Step 10\n-5", "-5"),
        ("(B) -5", "-5"),
        ("10 -12", "-12"),
        ("The sum:\n---\n5", "5"),
        ("= - 5", "-5"),
        ("Das macht 1.000,50 \u20ac", "1000.5"),
        ("-1.234.567,8", "-1234567.8"),
        ("1.234.567", "1234567"),
        ("1.000", "1"),
        ("3.141,2.718", None),
        ("It costs \u20b912,34,567.50", "1234567.5"),
        ("#### 1,00,000", "100000"),
        ("Il reste 1\u202f000 \u20ac", "1000"),
        ("Il reste 12\u00a0345,50 \u20ac", "12345.5"),
        ("= - 1 234 567.89", "-1234567.89"),
        ("- 1 234 567.89", "1234567.89"),
        ("1'234.50 Franken", "1234.5"),
        ("so \\boxed{12\\,345}", "12345"),
        ("so $1{,}000{,}000$", "1000000"),
        ("in 2019 100 of 1 1/2", "1.5"),
        ("4 12 or 1234 567", "567"),
        ("So it is:\n- 18 eggs", "18"),
        ("- 18 eggs", "18"),
        (" \t-  18 eggs", "18"),
        ("-18 eggs", "-18"),
        ("\u2212 18", "-18"),
        ("Both:\n  - 3 hens\n  - 18 eggs", "18"),
        ("It is\n-18", "-18"),
        ("#### - 5", "-5"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: str | None) -> None:
    assert last_number(text) == NUMBER.extract(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # fractions and mixed numbers
        ("1 000 1/2", "1000.5"),
        ("1,000 1/2", "1000.5"),
        ("1\u00a0000 1/2", "1000.5"),
        ("12 345 678,9", "12345678.9"),
        ("3 / 4", "0.75"),
        ("3\u20444", "0.75"),
        ("1.5/2", "0.75"),
        ("1,000/8", "125"),
        ("\u00be", "0.75"),
        ("1\u00bd and 2 \u00bc", "2.25"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\dfrac{3}{4} \text{ cups}", "-0.75"),
        (r"\frac{-3}{4}", "-0.75"),
        (r"1\frac{1}{2}", "1.5"),
        (r"1\tfrac12", "1.5"),
        (r"{3 \over 4}", "0.75"),
        ("3/4ths of it", "0.75"),
        ("2 - 1/2", "0.5"),
        # powers of ten
        ("1.5e3", "1500"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("3 \u00d7 10\u2078 m/s", "300000000"),
        ("10^3", "1000"),
        # a minus
        ("x = \u20134", "-4"),
        ("10\u201312", "12"),
        # units, percent, currency
        ("5 cm^2", "5"),
        ("5 m\u00b2", "5"),
        (r"90^\circ", "90"),
        (r"\boxed{18\text{ cm}^2}", "18"),
        (r"50\%", "50"),
        ("USD5", "5"),
        ("5 kg of CO2", "5"),
        (r"\$1{,}000.00", "1000"),
        ("$5/hour", "5"),
        ("1_000", "1000"),
        # boxes
        (r"so \boxed{42}, in 3 steps", "42"),
        (r"\boxed{\frac{1}{2}} of 3", "0.5"),
        (r"\boxed{1}, no \boxed{x = 2}", "2"),
        (r"\boxed{1} #### 2", "2"),
        # two numbers
        ("07 123", "123"),
        ("1234 567", "567"),
        ("5, 10", "10"),
        ("**5** 3", "3"),
        ("*5* 3", "3"),
        ("5 * 3 = 15, or 5*3=15", "15"),
        ("5 +3", "3"),
        ("- 5\n* 3", "3"),
        # a sign in a fraction
        ("5/-2", "-2.5"),
        ("-5 / -2", "2.5"),
        (r"\frac{5}{-2}", "-2.5"),
        ("3  /  4", "0.75"),
        # a sign or more beside a box
        (r"-\boxed{5}", "-5"),
        (r"10 - \boxed{5}", "5"),
        (r"\$\boxed{18}\%", "18"),
        (r"\boxed{5} 000 or 1", "5"),
        (r"of 1 \boxed{200}", "200"),
        (r"\boxed{5}/2", "2.5"),
        (r"3/\boxed{4}", "0.75"),
        (r"\boxed{5}^\circ", "5"),
        (r"\boxed5!", "5"),
        # what a marker or a box is followed by
        ("#### 5 + 3 = 8", "8"),
        ("#### x = 5, so 7", "5"),
        # several readings, or not computed
        *(
            (text, None)
            for text in (
                "1,5", "1,50", "0,5", "07,123", "1234,567", "1,234,56", "1,2,3", "1.2.3", "1,234.567.8", "1234 000",
                "3:30", "5/12/2024", "2024-05-12", "2-1/2", "1/2/3", "1.000 1/2", "7 10/5", "1 100/300", "1 000/3",
                "3/1 000", "1/0", "2^10", "2**10", "2^{10}", "(1+2)^2", r"2\sqrt{3}", r"\sqrt{16}", r"\frac{x}{4}",
                r"3\pi", "3\u03c0", r"\pi/4", r"\frac{\sqrt{2}}{2}", "\u00b15", r"0.\overline{3}", "0.(3)", "0x1F",
                "x/2", "1e12345", "1//2", "1 // 2", "x//2", "5/(2)", "5/-(2)", "x/-2", "-(5)", "(2)(3)", "2*3",
                "2 * -3", r"2 \times 3", r"2\cdot 3", "2\u00d73", "6 \u00f7 3", r"6\div 3", "5+3", "5 + 3",
                "(1 + 2) * 3", "5 \u00b1 2", r"5 \pm 2", "3/4 x 10^2", "50%*2", "2^3*4", "2 ** 10", "2**1.5",
                "{5}^{2}", "(5)^2", "sqrt(16)", "log(1,000)", r"\log_2 8", r"\binom{5}{2}", r"\binom{5}{2} \times 2",
                r"\boxed{5}^{2}", r"\boxed{5}^2", r"2^{\boxed{3}}", r"2\boxed{3}\times 4", r"\frac{1}{\boxed{2}}",
                "#### 5/(2)", "#### 2 * 3", "#### (5)^2", r"CO\boxed{2}",
                r"\boxed{2, 3}", r"\boxed{x}", r"12 \boxed{1", "#### 1,5",
            )
        ),
    ],
)  # fmt: skip
def test_a_number_is_read_as_a_whole_or_not_at_all(text: str, number: str | None) -> None:
    assert last_number(text) == last_number(f"It is {text}.") == number


@pytest.mark.parametrize("text", ["\\sqrt" + " " * 200_000, "\\sqrt[" * 200_000, "\\frac" + " " * 200_000])
def test_an_unfinished_expression_of_any_length_is_read_at_once(text: str) -> None:
    """It would take hours if the time grew with the square of the length."""
    assert last_number(f"{text} words and 7") == "7"


def _spellings(value: Fraction) -> list[str]:
    """Ways to write a number, each with only one reading."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(top, bottom)
    found = [f"{sign}{top}/{bottom}", f"{sign}{top} / {bottom}"]
    found += [f"{sign}\\{name}{{{top}}}{{{bottom}}}" for name in ("frac", "dfrac", "tfrac")]
    if whole and rest and rest < 100:
        groups = f"{whole:,}"
        found += [f"{sign}{whole} {rest}/{bottom}", f"{sign}{groups} {rest}/{bottom}"]
        found += [f"{sign}{groups.replace(',', mark)} {rest}/{bottom}" for mark in (" ", "\u202f", "'", r"\,", "{,}")]
        found.append(f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}")
    if 10**9 % bottom == 0:
        exact = Decimal(top * 10**9 // bottom).scaleb(-9)
        decimal = f"{exact:.9f}"
        found += [sign + decimal, f"{sign}{exact:,.9f}", f"{sign}{decimal}e0", f"{sign}{decimal} \\times 10^{{0}}"]
        found += [f"{sign}{top * 10**9 // bottom}e-9", f"{sign}{top * 10**9 // bottom} \u00d7 10\u207b\u2079"]
    return found


@settings(max_examples=40)
@given(
    st.one_of(
        st.fractions(-(10**6), 10**6, max_denominator=997),
        st.builds(Fraction, st.integers(-(10**12), 10**12), st.sampled_from([1, 2, 8, 10, 1000, 10**9])),
    ),
    st.sampled_from(
        ["{}", "So it is {}.", "5 and 7, so ${}$", r"of 8 it is \boxed{{{}}}, of 3", "3 #### {} in 2 days"]
    ),
)
def test_a_fraction_is_the_same_in_every_spelling(value: Fraction, text: str) -> None:
    expected = Decimal(value.numerator) / Decimal(value.denominator)
    for spelling in _spellings(value):
        for minus in ("-", "\u2212", "\u2013") if "-" in spelling else ("-",):
            assert number_in(text.format(spelling.replace("-", minus))) == expected, (text, spelling, minus)


OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    **{f"{{}}{sign}{{}}": lambda a, b: a * b for sign in ("*", " * ", "\u00d7", r"\times ", r" \cdot ")},
    **{f"{{}}{sign}{{}}": lambda a, b: a / b for sign in ("\u00f7", " \u00f7 ", r"\div ", "/", " / ", "/(", "  /  ")},
    **{f"{{}}{sign}{{}}": lambda a, b: a + b for sign in ("+", " + ")},
    "{}/-{}": lambda a, b: -a / b,
    "{}//{}": lambda a, b: a / b,
    "({})({})": lambda a, b: a * b,
    "-({}/{})": lambda a, b: -a / b,
    "({}/{})^2": lambda a, b: (a / b) ** 2,
    "{{{}}}^{{2}}*{}": lambda a, b: a**2 * b,
}
"""Expression of two numbers -> its value."""


@given(
    st.lists(st.one_of(st.integers(1, 10**6), st.decimals(1, 999, places=2)), min_size=2, max_size=2),
    st.sampled_from([*OPERATORS]),
    st.sampled_from(["{}", "So it is {}.", "#### {}", r"of 8 it is \boxed{{{}}}", "x = ${}$"]),
)
def test_no_part_of_an_expression_is_its_value(numbers: list[int | Decimal], expression: str, text: str) -> None:
    value = OPERATORS[expression](*map(Fraction, numbers))
    found = number_in(text.format(expression.format(*numbers)))
    assert found is None or abs(Fraction(found) / value - 1) < Fraction(1, 10**20)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.00", "{:,}.0"]))
def test_a_number_is_the_same_in_every_spelling(value: int, spelling: str) -> None:
    assert last_number(f"so it is {spelling.format(value)}.") == str(value)


@pytest.mark.parametrize(("name", "rows"), [("train", 7473), ("test", 1319)])
def test_every_reference_of_gsm8k_gives_its_number(name: str, rows: int) -> None:
    file = SHARED_DATA / f"gsm8k_{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is missing")
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == rows
    for answer in answers:
        (published,) = re.findall(
            r"^#### (-?[0-9.,]+)$", answer, re.MULTILINE
        )  # the expression of the data set's authors
        assert NUMBER.extract(answer) == published.replace(",", "")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("The answer is A, no: the answer is C", "C"),
        ("B", None),
        ("The answer is Aha", None),
    ],
)
def test_a_regular_expression_gives_its_group_of_the_last_match(text: str, letter: str | None) -> None:
    assert LETTER.extract(text) == letter
    assert label(LETTER, text) == (letter or NO_LABEL)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("(", "or a regular expression: "),
        ("none", "one group; it has 0"),
        ("(a)(b)", "one group; it has 2"),
        ("", "1 character"),
    ],
)
def test_a_bad_expression_is_refused(value: str, what: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(what)):
        Settings(task={"final_answer": value})


def test_accuracy_is_judged_on_the_answer_after_the_trace() -> None:
    records = [record(f"Question {i}?", f"It is so. #### {i}", reasoning_content="Maybe 99?") for i in range(5)]
    task, questions = select_questions([*records, record("Why?", "Because.")], Settings(task=NUMBER))
    assert task == NUMBER and questions == records, "a reference without a number is not asked"
    scoring = Scoring(questions, task, {})
    answers = [
        Answer("0.0"),
        Answer("It is 1,", "not 5"),
        Answer("3"),
        Answer("", "It is 3, I think"),
        Answer("I pass"),
    ]
    found = scoring.score(answers)
    assert (found["accuracy"], found["no_final_answer"], found["n"]) == (0.4, 0.4, 5)
    assert list(scoring.names())[:2] == ["accuracy", "no_final_answer"] and scoring.mark_name == "accuracy"
    assert scoring.marks(answers) == [1, 1, 0, 0, 0]
    assert scoring.offers[0].reasoning


def test_text_without_any_final_answer_is_free_text(caplog: pytest.LogCaptureFixture) -> None:
    rows = [record("Why?", "Because.")]
    assert select_questions(rows, Settings(task=NUMBER)) == (None, rows)
    assert "none of 1 test answers is a text with a final answer (number)" in caplog.text


def test_a_classifier_is_not_scored_by_final_answers() -> None:
    scoring = Scoring([record("1?", "1")], NUMBER, {})
    assert scoring.names(writes=False) == {}


def test_an_answer_without_a_final_answer_is_wrong_where_that_of_the_reference_is_none() -> None:
    task = FinalAnswer(final_answer=r"Entities: (.*)")
    records = [record(f"{text}?", f"Entities: {text}") for text in ("(none)", "Oslo")]
    scoring = Scoring(select_questions(records, Settings(task=task))[1], task, {})
    silent, right = [Answer("I pass")] * 2, scoring.references
    assert scoring.marks(silent) == [0, 0] and scoring.marks(right) == [1, 1]
    assert [scoring.score(answers)["accuracy"] for answers in (silent, right)] == [0, 1]
