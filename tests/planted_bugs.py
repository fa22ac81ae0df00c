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
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
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


@functools.cache
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


def warm_up():
    """Import what takes seconds, once: the tests of each bug run in a fork of this process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    for kind in ("Llama", "GPT2", "GPTNeoX", "Qwen3", "Gemma3"):
        getattr(transformers, f"{kind}ForSequenceClassification")
    return pytest


class Trial:
    """The tests of one bug, or of none, running in a fork, in a copy of the project."""

    def __init__(self, pytest, bug, tests):
        self.bug = bug
        self.folder = Path(tempfile.mkdtemp())
        self.outcome = ""
        copy = self.folder / "copy"
        copy_project(copy)
        if bug:
            try:
                changed = plant((ROOT / bug.file).read_text(), bug)
            except (ValueError, SyntaxError) as e:
                self.end(f"NOT PLANTED: {e}")
                return
            (copy / bug.file).write_text(changed)
        self.started = time.time()
        self.pid = os.fork()
        if self.pid == 0:
            run_tests(pytest, copy, self.folder, tests)

    def end(self, outcome):
        self.outcome = outcome
        shutil.rmtree(self.folder, ignore_errors=True)

    def poll(self):
        """Set the outcome if the tests have come to an end, or run for too long."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            names = {0: "SURVIVED", 1: "killed", 2: "BROKEN: the tests do not start"}
            if code == 1 and not self.bug:
                print((self.folder / "out").read_text()[-2000:], flush=True)
            self.end(names.get(code, f"BROKEN: pytest ends with {code}; no such tests?"))
        elif time.time() - self.started > SECONDS:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.end("killed")


def run_tests(pytest, copy, folder, tests):
    """In the fork: run pytest on these tests, and end the process with its exit code."""
    os.setpgid(0, 0)
    os.chdir(copy)
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    paths = [f"tests/{word}" if re.match(r"test_\w+\.py", word) else word for word in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "temporary")]
    code = pytest.main([*options, *paths])
    os._exit(int(code))


def run_all(pytest, tasks, jobs):
    """Run (bug, tests) tasks, some at a time, and yield (bug, tests, outcome) as they end."""
    waiting = list(tasks)
    running = []
    while waiting or running:
        while waiting and len(running) < jobs:
            bug, tests = waiting.pop(0)
            running.append((Trial(pytest, bug, tests), tests))
        time.sleep(0.05)
        for trial, tests in list(running):
            if not trial.outcome:
                trial.poll()
            if trial.outcome:
                running.remove((trial, tests))
                yield trial.bug, tests, trial.outcome


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
    pytest = warm_up()
    calls = {tuple(bug.tests): bug.tests for bug in bugs}
    unhealthy = set()  # calls that fail without a bug: with one, their failure would say nothing
    for _, tests, outcome in run_all(pytest, [(None, x) for x in calls.values()], args.jobs):
        if outcome != "SURVIVED":
            unhealthy.add(tuple(tests))
            print(f"without a bug: {outcome}: {' '.join(tests)}", flush=True)
    left = []
    for bug, tests, outcome in run_all(pytest, [(bug, bug.tests) for bug in bugs], args.jobs):
        if tuple(tests) in unhealthy:
            outcome = "ITS TESTS FAIL WITHOUT IT"
        print(f"{outcome:9} {bug}", flush=True)
        if outcome != "killed":
            left.append((bug, outcome))
    print(f"\n{len(bugs)} bugs, {len(bugs) - len(left)} killed, {len(left)} not:")
    for bug, outcome in left:
        print(f"{outcome}  {bug}  [{' '.join(bug.tests)}]")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
