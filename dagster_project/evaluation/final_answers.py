"""Tasks with a final answer: a number or a text that is extracted from the response, as in GSM8K."""

from __future__ import annotations

import re
from functools import cached_property

from pydantic import Field, field_validator

from dagster_project.core.params import Section
from dagster_project.training.inference.numbers import number_in

NUMBER = "number"


class FinalAnswer(Section):
    """The response ends in an answer that can be extracted; the text before it is not compared."""

    final_answer: str = Field(min_length=1)
    r"""How to extract it, from the response and from the reference. `number`: the number after the last `####`, else in
    the last `\boxed{}`, else the last number. Commas between groups of digits, `$`, units, `%` and decimals that are
    zero do not count. `3/4`, `\frac{3}{4}`, `1 1/2`, `1e3` and `1.5 \times 10^3` are one number each. `1.000,50` is
    1000.5. A space, an apostrophe, `_`, `{,}` or `\,` may be between groups of three digits: `1 000` is 1000.
    `12,34,567` and `10,20,300` are one number each, as India writes them: a list of such numbers needs commas and
    spaces. An expression that can be read in several ways (`1,5`, `3:30`, `2-1/2`, `1//2`) or is not computed (`2^10`,
    `\boxed{5}^{2}`, `2\sqrt{3}`, `sqrt(16)`, `3 * 4`, `5 + 3`) does not count as an answer; after `####` and in a box,
    what follows its last `=` counts. A hyphen and a space at the beginning of a line are a list's, not a minus.
    Else a regular expression with one group, which is the answer; of several matches the last one."""

    @field_validator("final_answer")
    @classmethod
    def _one_group(cls, value: str) -> str:
        if value == NUMBER:
            return value
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"must be `number`, or a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must be `number`, or a regular expression with one group; it has {groups}")
        return value

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.final_answer)

    def extract(self, text: str) -> str | None:
        """The final answer of a response or reference; None if it has none."""
        if self.final_answer == NUMBER:
            return last_number(text)
        found = [match.group(1) for match in self._pattern.finditer(text) if match.group(1) is not None]
        return found[-1].strip() if found else None


def last_number(text: str) -> str | None:
    """The number after the last `####`, else the last number, in one spelling.

    >>> last_number("It costs $1,250.50 or 3 coins. #### 1,250.50")
    '1250.5'
    """
    number = number_in(text)
    if number is None:
        return None
    text = f"{number if number else abs(number):f}"  # without an exponent, and -0 as 0
    return text.rstrip("0").rstrip(".") if "." in text else text
