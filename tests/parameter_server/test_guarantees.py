"""Each line of what docs/parameter_server.md guarantees, and does not, names its tests."""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parents[1] / "docs" / "parameter_server.md"


def lines(section):
    """Those of a section, but for the heads of its tables."""
    text = re.search(rf"^## {section}\n(.*?)^## ", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]
    heads = re.compile(r"^\|.*\|\n\|[-|]+\|\n", re.MULTILINE)
    return heads.sub("", text).split("\n")


@pytest.mark.parametrize("section", ["What is guaranteed", "What is not"])
def test_each_line_names_tests_that_there_are(section):
    named = [line for line in lines(section) if line]
    assert len(named) > 6
    defined = set(
        re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in TESTS.glob("*.py")), re.M)
    )
    for line in named:
        tests = re.fullmatch(r"\|.* \| ((`test_\w+`(, )?)+) \|", line)
        assert tests, f"names no test: {line}"
        assert set(re.findall(r"test_\w+", tests[1])) <= defined, line
