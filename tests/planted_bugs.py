"""Plant bugs, one at a time, in a copy of the project, and list those that no test sees.

    python tests/planted_bugs.py                 # all of them
    python tests/planted_bugs.py ppo.py gamma    # those with both words in their line
    python tests/planted_bugs.py --list          # a line for each; nothing runs

By hand, not in the suite. The bugs are in tests/bugs/*.txt, three lines each:

    grpo.py:main | kl metric: a token over padding | test_grpo.py -k metric
    - kl.sum(1).mean()
    + kl.mean()

The file (and the function or class in which the text stands, where the file has it twice), what is
broken, and what pytest is called with: the tests that should see it. The old text is found by its
tokens, whatever the white space between them, and may span lines; each of several `-` lines, and of
`+` lines, is one line of it. A text that is not there once is said, and counts as a failure.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # the longest that the tests of one bug may take


@dataclass
class Bug:
    file: str
    scope: str  # name of a function or class; empty: the whole file
    what: str
    tests: list  # arguments of pytest
    old: str
    new: str

    def __str__(self):
        return f"{self.file}: {self.what}"


def read_bugs(text):
    """The text of a file of bugs -> list of Bug."""
    bugs = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        where, what, tests = [part.strip() for part in lines[0].split(" | ")]
        old = [line[2:] for line in lines[1:] if line.startswith("- ")]
        new = [line[2:] for line in lines[1:] if line.startswith("+ ")]
        if not old or len(old) + len(new) != len(lines) - 1 - lines.count("+"):
            raise SystemExit(f"planted_bugs.py: cannot read {block!r}")
        file, _, scope = where.partition(":")
        tests = re.findall(r'"[^"]*"|\S+', tests)
        tests = [word.strip('"') for word in tests]
        bugs.append(Bug(file, scope, what, tests, "\n".join(old), "\n".join(new)))
    return bugs


def scope_of(source, name):
    """Start and end, in characters, of the function or class of this name; of all without one."""
    if not name:
        return 0, len(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and node.name == name:
            return starts[node.lineno - 1], starts[node.end_lineno]
    return 0, 0


def plant(source, bug):
    """Source with the bug -> source; ValueError where its text is not there just once."""
    begin, end = scope_of(source, bug.scope)
    tokens = re.findall(r"\w+|[^\w\s]", bug.old)
    pattern = r"\s*".join(re.escape(token) for token in tokens)
    if re.match(r"\w", bug.old):
        pattern = r"(?<!\w)" + pattern
    if re.search(r"\w$", bug.old):
        pattern += r"(?!\w)"
    found = [m for m in re.finditer(pattern, source[begin:end])]
    if len(found) != 1:
        raise ValueError(f"its text is there {len(found)} times")
    start, stop = begin + found[0].start(), begin + found[0].end()
    line = source[source.rfind("\n", 0, start) + 1 : start]
    indent = line if not line.strip() else re.match(r"\s*", line).group()
    changed = source[:start] + bug.new.replace("\n", "\n" + indent) + source[stop:]
    compile(changed, bug.file, "exec")
    return changed


def copy_project(folder):
    """A copy of what the tests need, in which toy/ and the repository's other data are links."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".md") or path.name == ".ci":
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
    for name in ("tests", "benchmarks", "toy", "docs"):
        if (ROOT / name).exists():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png")
            )


def run_tests(folder, tests):
    """pytest's exit code: 0 where all pass, 1 where one fails; and its last lines."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env.setdefault("OMP_NUM_THREADS", "1")
    paths = [f"tests/{word}" if re.match(r"test_\w+\.py", word) else word for word in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, "the tests did not come to an end"
    return done.returncode, done.stdout[-1500:]


def try_bug(bug):
    """-> "killed", "SURVIVED" or what is wrong with the bug."""
    source = (ROOT / bug.file).read_text()
    try:
        changed = plant(source, bug)
    except (ValueError, SyntaxError) as e:
        return f"NOT PLANTED: {e}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        copy_project(folder)
        (folder / bug.file).write_text(changed)
        code, _ = run_tests(folder, bug.tests)
    names = {0: "SURVIVED", 1: "killed", 2: "BROKEN: the tests do not start"}
    return names.get(code, f"BROKEN: pytest ends with {code}; no such tests?")


def healthy(tests):
    """Whether these tests pass without a bug: else a failure would say nothing."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        copy_project(folder)
        code, out = run_tests(folder, tests)
    if code:
        print(f"without a bug {' '.join(tests)} ends with {code}:\n{out}", flush=True)
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only bugs with all of these words in their line")
    parser.add_argument("--list", action="store_true", help="print the bugs, run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time")
    parser.add_argument("--bugs", default=str(ROOT / "tests" / "bugs"), help="file or folder")
    args = parser.parse_args()
    path = Path(args.bugs)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    bugs = [bug for file in files for bug in read_bugs(file.read_text())]
    bugs = [bug for bug in bugs if all(word in str(bug) for word in args.words)]
    if args.list:
        print(*bugs, sep="\n")
        print(f"{len(bugs)} bugs")
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        calls = list({tuple(bug.tests): bug.tests for bug in bugs}.values())
        well = dict(zip(map(tuple, calls), pool.map(healthy, calls), strict=True))
        ready = [bug for bug in bugs if well[tuple(bug.tests)]]
        left = [(bug, "ITS TESTS FAIL WITHOUT IT") for bug in bugs if not well[tuple(bug.tests)]]
        for bug, outcome in zip(ready, pool.map(try_bug, ready), strict=True):
            print(f"{outcome:9} {bug}", flush=True)
            if outcome != "killed":
                left.append((bug, outcome))
    print(f"\n{len(bugs)} bugs, {len(bugs) - len(left)} killed, {len(left)} not:")
    for bug, outcome in left:
        print(f"{outcome}  {bug}  [{' '.join(bug.tests)}]")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
