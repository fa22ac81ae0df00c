"""planted_bugs.py itself, and that each bug of tests/bugs can be planted. No test runs another."""

import planted_bugs
import pytest
from conftest import ROOT
from planted_bugs import Bug, plant, read_bugs

SOURCE = """
def first(a, b):
    c = a + b
    return [c,
            a - b]


class Second:
    def first_of(self, a):
        c = a + 2 * b
        return c
"""


def bug(old, new, scope=""):
    return Bug("some.py", scope, "what", [], old, new)


def test_bugs_are_read():
    text = """# said before the first

a.py:main | one | test_a.py -k "x or y"
- old(1)
+ new(2)

# said before the second
b.py | two: three | test_b.py test_c.py
- if old:
-     do
+ if new:
+
+     do

c.py | nothing is left | test_c.py
- old
"""
    one, two, three = read_bugs(text)
    assert one == Bug("a.py", "main", "one", ["test_a.py", "-k", "x or y"], "old(1)", "new(2)")
    assert two.old == "if old:\n    do" and two.new.split() == ["if", "new:", "do"]
    assert two.file == "b.py" and two.scope == "" and two.tests == ["test_b.py", "test_c.py"]
    assert three.new == "" and str(three) == "c.py: nothing is left"


@pytest.mark.parametrize("text", ["a.py | one | t.py\n+ new", "a.py | one | t.py\n- old\nnew"])
def test_what_is_no_bug_is_refused(text):
    with pytest.raises(SystemExit):
        read_bugs(text)


@pytest.mark.parametrize("old", ["return [c, a - b]", "return[c,a-b]", "return [c,\n a\n - b ]"])
def test_a_text_is_found_whatever_its_white_space(old):
    got = plant(SOURCE, bug(old, "return [c]"))
    assert got == SOURCE.replace("[c,\n            a - b]", "[c]")


def test_a_text_has_to_be_there_once():
    for old, times in (("nothing", 0), ("return", 2), ("c = a", 2), ("return [b]", 0)):
        with pytest.raises(ValueError, match=f"there {times} times"):
            plant(SOURCE, bug(old, "pass"))


def test_a_part_of_a_word_is_not_the_word():
    assert "b" in plant(SOURCE, bug("2 * b", "2"))
    with pytest.raises(ValueError, match="there 0 times"):
        plant(SOURCE, bug("irst(a, b)", "x"))
    with pytest.raises(ValueError, match="there 0 times"):
        plant(SOURCE, bug("retur", "x"))


def test_a_scope_is_a_function_or_class():
    got = plant(SOURCE, bug("c = a +", "c = a -", "first"))
    assert got == SOURCE.replace("c = a + b", "c = a - b")
    got = plant(SOURCE, bug("c = a +", "c = a -", "Second"))
    assert got == SOURCE.replace("c = a + 2", "c = a - 2")
    assert got == plant(SOURCE, bug("c = a +", "c = a -", "first_of"))
    with pytest.raises(ValueError, match="there 0 times"):
        plant(SOURCE, bug("c = a +", "c = a -", "missing"))


def test_lines_of_a_bug_are_indented_like_the_first():
    got = plant(SOURCE, bug("c = a + b", "c = a\nc += b", "first"))
    assert got == SOURCE.replace("    c = a + b", "    c = a\n    c += b")


def test_what_does_not_compile_is_refused():
    with pytest.raises(SyntaxError):
        plant(SOURCE, bug("c = a + b", "c = = a", "first"))


FILES = sorted((ROOT / "tests" / "bugs").glob("*.txt"))


def test_there_are_bugs():
    assert FILES and planted_bugs.ROOT == ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_bug_can_be_planted(path):
    """Its text is there once, the bug compiles and changes something, its test files exist."""
    wrong = []
    for each in read_bugs(path.read_text()):
        source = (ROOT / each.file).read_text()
        try:
            assert plant(source, each) != source, "it changes nothing"
        except (ValueError, SyntaxError, AssertionError) as error:
            wrong.append(f"{each}: {error}")
        files = [word for word in each.tests if word.endswith(".py")]
        wrong += [f"{each}: {file}" for file in files if not (ROOT / "tests" / file).exists()]
    assert not wrong, "\n".join(wrong)
