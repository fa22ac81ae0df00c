"""The commands of the docstrings and the README: their flags exist, and on the toy they start."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

import plumbing

SCRIPTS = [p.stem for p in ROOT.glob("*.py") if p.stem not in ("common", "plumbing")]


def commands():
    """Every `python SCRIPT.py ...`, in a line of its own or between backticks."""
    found = []
    for path in [*ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = path.read_text().split('"""')[1] if path.suffix == ".py" else path.read_text()
        text = re.sub(r"\\+\n\s*", " ", text)
        found += re.findall(r"^    (?:MALLOC\S+ )*python ([a-z_]+\.py.*?)(?:  +#.*)?$", text, re.M)
        found += re.findall(r"`python ([a-z_]+\.py[^`]*)`", text)
        real = re.findall(r"^\| `([a-z_]+\.py --[^`]*)`", text, re.M)  # of the table of real runs
        found += [command + " --model M" for command in real]
    return sorted({x for x in found if x.split(".py")[0] in SCRIPTS})


class Started(Exception):
    pass


def test_there_are_commands():
    assert len(commands()) > 30 and {x.split(".py")[0] for x in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documentation(command, tmp_path, monkeypatch):
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr("sys.argv", [script, *flags])
    args = plumbing.parse_args(module.Args, module.TOY)
    if "--model" in flags or "runs/rm_bt" in command:
        return
    (tmp_path / "toy").symlink_to(ROOT / "toy")
    monkeypatch.chdir(tmp_path)

    def begin(*_):
        raise Started

    monkeypatch.setattr(plumbing.Run, "begin", begin)
    with pytest.raises(Started):
        module.main(args)
