"""Documents beside the code: commands start, the book's page and the docstrings agree."""

import ast
import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT

import dpo_nll
import grpo
import plumbing
import ppo
import reinforce_rloo
import rejection_sampling
import rm_bt
import rm_kwise

DOCS = list(ROOT.glob("docs/*.md"))
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
    if "--model" in flags or "runs/rm_bt" in command or "/final" in command:
        return
    (tmp_path / "toy").symlink_to(ROOT / "toy")
    monkeypatch.chdir(tmp_path)

    def begin(*_):
        raise Started

    monkeypatch.setattr(plumbing.Run, "begin", begin)
    with pytest.raises(Started):
        module.main(args)


# --- docs/book.md beside the code, both ways ------------------------------------------------------

SECTION = r"\d+(?:\.\d+)+"


def definitions():
    """{(file, function or class): docstring} of everything at the top level of our files."""
    found = {}
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[path.stem, node.name] = ast.get_docstring(node) or ""
    return found


def paragraphs():
    """[(sections, {(file, name), ...}, text)] of docs/book.md: what a paragraph names belongs to
    the file that it links to last before the name."""
    known = definitions()
    found = []
    file = ""
    for text in (ROOT / "docs/book.md").read_text().split("\n\n"):
        head = re.match(r"(?:## \d+|\*\*)[^*]*(?:\*\*)?", text)
        sections = set(re.findall(SECTION, head[0])) if head else set()
        chapter = re.match(r"## (\d+)", text)
        if chapter:
            sections.add(chapter[1])
        names = set()
        # A link stands before or behind the names of its file: names belong to the nearest one
        for word in re.findall(r"`([\w.]+)`", text):
            if word.endswith(".py"):
                file = word.removesuffix(".py").split("/")[-1]
        files = re.findall(r"\[`(?:\w+/)?(\w+)\.py`\]", text) or [file]
        for word in re.findall(r"`(\w+)`", text):
            names |= {(name, word) for name in files if (name, word) in known}
        found.append((sections, names, text))
    return found


def cited(docstring):
    """Sections of the book that a docstring names: "Book 11.1.5, eq. 10", "book 8.2, 8.3"."""
    lists = re.findall(rf"[Bb]ook(?:'s)? ((?:{SECTION}(?:, | and )?)+)", docstring)
    return set(re.findall(SECTION, " ".join(lists)))


def test_what_a_docstring_cites_is_in_the_book_page():
    """Under that section, with the file in which the function stands."""
    places = paragraphs()
    missing = []
    count = 0
    for place, docstring in definitions().items():
        for section in cited(docstring):
            count += 1
            if not any(section in sections and place in names for sections, names, _ in places):
                missing.append((*place, section))
    assert not missing and count > 25


def test_what_the_book_page_names_is_there_and_says_where_it_is_from():
    """Every name in backticks is a function, a flag, a metric or a file; every function names its
    section or paper in its docstring, or in its file's header."""
    known = definitions()
    names = set().union(*(names for _, names, _ in paragraphs()))
    assert len(names) > 35
    for file, name in names - {("ppo", "main"), ("grpo", "main")}:
        header = ast.get_docstring(ast.parse((ROOT / f"{file}.py").read_text())) or ""
        line = re.search(rf"^ +{name} .*\d.*$", header, re.M)
        told = re.search(r"[Bb]ook|eq\. \d|arXiv|et al\.|20\d\d", known[file, name])
        assert line or told, (file, name)


def test_files_and_functions_of_the_book_page_exist():
    names = {name for _, name in definitions()}
    text = (ROOT / "docs/book.md").read_text()
    other = {"clip_frac", "approx_kl", "gamma", "unsqueeze"}
    for word in re.findall(r"`([a-z]\w+)`", text):
        assert word in names | other, word


@pytest.mark.parametrize(
    "section",
    "7.1 7.4.1 7.4.2 7.4.3 7.5 7.6 7.8 8.1 8.2 8.3 9 10.2.2 10.2.3 10.3 11.1 11.1.1 11.1.2 11.1.3 "
    "11.1.4 11.1.5 11.2 11.2.2 11.2.3 11.3 11.4 12".split(),
)
def test_every_section_with_a_formula_is_on_the_book_page(section):
    assert any(section in sections for sections, _, _ in paragraphs())


def test_the_numbers_of_the_book_page_are_the_codes():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    controller = ppo.AdaptiveKLController(0.15, 6.0, 10000)
    controller.update(12.0, 512)
    four_logps = [torch.tensor([x]) for x in (-1.0, -2.0, -2.0, -1.0)]
    losses = torch.ones(2, 10)
    losses[0, 4] = losses[1, 9] = 10.0
    mask = torch.arange(10) < torch.tensor([[5], [10]])
    by_hand = {
        "0.313262": rm_bt.bradley_terry_loss(one, zero),
        "0.414370": rm_bt.bradley_terry_loss(one, zero, torch.tensor([1 / 3])),
        "0.720868": rm_kwise.plackett_luce_loss(
            torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3).bool()
        ),
        "0.598139": dpo_nll.dpo_loss(*four_logps, 0.1),
        "1.835089": rejection_sampling.best_of_n_kl(16),
        "0.151536": controller.beta,
        "2.35": (grpo.token_weights(mask, "sequence", 10) * losses).sum(),
        "2.2": (grpo.token_weights(mask, "token", 10) * losses).sum(),
    }
    text = " ".join((ROOT / "docs/book.md").read_text().split())
    for printed, value in by_hand.items():
        digits = len(printed.split(".")[1])
        assert f"{float(value):.{digits}f}" == printed and printed in text, (printed, value)
    assert "-0.9258, -0.4629, 0, 1.3887" in text and "-2.6667, -1.3333, 0, 4" in text
    group = grpo.group_advantages(rewards, 4).tolist()
    assert group == pytest.approx([-0.9258, -0.4629, 0, 1.3887], abs=1e-4)
    rloo = reinforce_rloo.rloo_advantages(rewards, 4).tolist()
    assert rloo == pytest.approx([-2.6667, -1.3333, 0, 4], abs=1e-4)


# --- Links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["README.md", *sorted(f"docs/{p.name}" for p in DOCS)])
def test_links_lead_to_files(path):
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\(([^)#\s]+)\)", text)
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / path).parent.joinpath(link).exists(), link
    assert "@@" not in text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_every_metric_is_explained():
    """docs/metrics.md has a row for each name that a script logs."""
    text = (ROOT / "docs/metrics.md").read_text()
    explained = set(re.findall(r"`([a-z_0-9]+)`", text))
    patterns = ("advantage_ms_", "eval_accuracy_better_", "_control")
    logged = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                if path.stem != "plumbing" and {"loss", "grad_norm"} & set(keys):
                    logged |= set(keys)
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "metrics":
                if isinstance(node.slice, ast.Constant):
                    logged.add(node.slice.value)
    missing = {name for name in logged - explained if not any(x in name for x in patterns)}
    assert len(logged) > 15 and not missing
