"""The rules of style that a program can see: each finding names the line and the rule."""

import ast
import importlib
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

import plumbing

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem not in ("common", "plumbing"))
FILES = ["common", "plumbing", *SCRIPTS]
TRAINERS = [name for name in SCRIPTS if name not in ("constitutional_ai", "judge")]

MAIN_LINES, MAIN_DEPTH, FUNCTION_LINES = 130, 4, 45
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def has_condition(node):
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node))


def depth(node, outside=0):
    """How many blocks stand in each other beneath a node; `elif` is not one deeper."""
    deepest = outside
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inside = outside + (isinstance(child, BLOCKS) and not is_elif)
        deepest = max(deepest, depth(child, inside))
    return deepest


def of_lengths(node):
    if not isinstance(node, ast.FunctionDef):
        return
    lines = node.end_lineno - node.lineno + 1
    if node.name == "main":
        if lines > MAIN_LINES:
            yield f"main has {lines} lines, more than {MAIN_LINES}"
        if depth(node) > MAIN_DEPTH:
            yield f"main is {depth(node)} levels deep, more than {MAIN_DEPTH}"
    elif lines > FUNCTION_LINES:
        yield f"{node.name} has {lines} lines, more than {FUNCTION_LINES}"


def of_comprehensions(node):
    if isinstance(node, COMPREHENSIONS):
        if len(node.generators) > 1:
            yield "a comprehension with two `for`"
        if any(len(generator.ifs) > 1 for generator in node.generators):
            yield "a comprehension with two `if`"
        if has_condition(node):
            yield "a conditional in a comprehension"


def of_conditionals(node):
    if isinstance(node, ast.Subscript) and has_condition(node.slice):
        yield "a conditional in a subscript"
    if isinstance(node, ast.Call):
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(isinstance(value, ast.IfExp) for value in values):
            yield "a conditional in an argument"


def of_calls(node):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return
    if node.func.id == "zip" and any(isinstance(value, ast.Starred) for value in node.args):
        yield "zip(*...)"
    if node.func.id == "sum" and len(node.args) > 1 and isinstance(node.args[1], ast.List):
        yield "sum(lists, [])"


def of_expressions(node):
    if isinstance(node, ast.NamedExpr):
        yield "a walrus"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp):
        yield "`x and y` as an if"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        sides = (node.left, node.right)
        text = any(isinstance(x, ast.JoinedStr) for x in sides)
        text |= any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in sides)
        condition = any(isinstance(x, ast.Compare | ast.BoolOp) for x in sides)
        if text or condition:
            yield "a text or a condition in a product"


def of_assignments(node):
    """Of several values in one statement; all empty or a number, and all moved with `.to`, are one
    idea."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return
    if not isinstance(node.targets[0], ast.Tuple):
        return
    values = node.value.elts
    empty = all(ast.unparse(value) in ("[]", "{}", "0", "0.0") for value in values)
    moved = all(ast.unparse(value).endswith(".to(device)") for value in values)
    if not (empty or moved):
        yield "a tuple assignment of unrelated things"


RULES = [
    of_lengths, of_comprehensions, of_conditionals, of_calls, of_expressions, of_assignments,
]  # fmt: skip


def findings(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        for rule in RULES:
            found += [f"line {node.lineno}: {text}" for text in rule(node)]
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_the_rules(name):
    assert findings((ROOT / f"{name}.py").read_text()) == []


LONG = "\n".join(["def f():", *["    x = 1"] * FUNCTION_LINES])
DEEP = "\n".join(["def main():", *[" " * (i + 1) + "if x:" for i in range(5)], " " * 7 + "pass"])
SHALLOW = (
    "def main():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass\n elif d:\n  pass\n else:\n  x"
)


@pytest.mark.parametrize(
    "source, found",
    [
        (LONG, 1), (LONG.replace("def f", "def main"), 0), (DEEP, 1), (SHALLOW, 0),
        ("\n".join(["def main():", *["    x = 1"] * MAIN_LINES]), 1),
        ("[y for x in z for y in x]", 1), ("[x for x in z if x if y]", 1),
        ("[x for x in z if x]", 0),
        ("{x: (1 if x else 2) for x in z}", 1), ("a[b if c else d]", 1), ("f(b if c else d)", 1),
        ("f(a=b if c else d)", 1), ("x = b if c else d", 0), ("zip(*a)", 1), ("zip(a, b)", 0),
        ("sum(a, [])", 1), ("sum(a)", 0), ("f(x := 3)", 1), ("x and y()", 1), ("z = x and y", 0),
        ("'a' * b", 1), ("[1] * b", 0), ("[1] * (a > b)", 1),
        ("a * (b > c)", 1), ("a * b", 0), ("a, b = 1, f(2)", 1),
        ("a, b = [], {}", 0), ("a, b = 0, 0.0", 0), ("a, b = f(x)", 0),
        ("a, b = a.to(device), b.to(device)", 0),
    ],
)  # fmt: skip
def test_the_rules_see_what_they_should(source, found):
    assert len(findings(source)) == found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_other_and_has_its_parts_in_order(name):
    """Args, TOY, the functions, main, the entry line."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    ours = imported & set(FILES)
    assert ours == {"common", "plumbing"}
    others = imported - ours - set(sys.stdlib_module_names)
    assert others <= {"torch", "transformers", "tyro", "tqdm", "safetensors", "matplotlib"}
    assert ast.get_docstring(tree)
    places = {}
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            places[node.name] = i
        elif isinstance(node, ast.Assign):
            places[node.targets[0].id] = i
    order = [places[part] for part in ("Args", "TOY", "main")]
    assert order == sorted(order) and places["main"] == len(tree.body) - 2
    assert ast.unparse(tree.body[-1]).endswith("run_script(main, Args, TOY)")


@pytest.mark.parametrize("name", TRAINERS)
def test_the_training_step_stands_in_main(name):
    """Clip, look whether it is finite, optimiser, scheduler, zero_grad, in this order."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    main = next(node for node in tree.body if getattr(node, "name", "") == "main")
    calls = []
    for node in ast.walk(main):
        if isinstance(node, ast.Call):
            calls.append((node.lineno, ast.unparse(node.func)))
    wanted = ["clip_grad_norm_", "check_finite", "optimizer.step", "scheduler.step", "zero_grad"]
    if name == "rejection_sampling":  # its policy and its control have one of each
        wanted[2:4] = ["optimizers[name].step", "schedulers[name].step"]
    found = []
    for _, function in sorted(calls):
        found += [word for word in wanted if function.endswith(word)]
    start = found.index("clip_grad_norm_")
    assert found[start : start + 5] == wanted


def test_docstrings_of_public_functions():
    """Every one has one; of a formula it says which section of the book or which paper."""
    for name in FILES:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                exempt = node.name in ("Args", "main") or node.name.startswith("_")
                assert exempt or ast.get_docstring(node), (name, node.name)


# --- common.py alone ------------------------------------------------------------------------------


def test_common_stands_alone(tmp_path):
    """In a folder that holds nothing else; importing it changes no global state."""
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    code = (
        "import logging, random, sys, warnings, torch, transformers\n"
        "def state():\n"
        "    names = ['', 'transformers', 'torch']\n"
        "    levels = [logging.getLogger(name).level for name in names]\n"
        "    bar = transformers.utils.logging.is_progress_bar_enabled()\n"
        "    grad = torch.is_grad_enabled()\n"
        "    drawn = torch.get_rng_state().tolist(), random.getstate()\n"
        "    dtype = torch.get_default_dtype(), torch.get_num_threads()\n"
        "    return levels, bar, grad, drawn, dtype, list(warnings.filters), list(sys.path)\n"
        "before = state()\n"
        "import common\n"
        "assert state() == before\n"
        "assert common.__file__.startswith(sys.path[0])\n"
        "print(common.masked_mean(torch.ones(2, 2), torch.ones(2, 2)).item())\n"
    )
    (tmp_path / "use.py").write_text(code)
    out = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout == "1.0\n", out.stderr


def test_common_ends_no_process_and_prints_nothing():
    tree = ast.parse((ROOT / "common.py").read_text())
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "attr", ""))
        assert name not in ("print", "SystemExit", "exit"), f"common.py line {node.lineno}"
        if isinstance(node, ast.Raise) and node.exc:
            assert ast.unparse(node.exc).startswith("ValueError("), f"line {node.lineno}"


# --- Flags that scripts share ---------------------------------------------------------------------

ONE_MEANING = [
    "overwrite", "seed", "device", "dtype", "share_prompts", "reward_model", "max_grad_norm",
    "checkpoint_every", "eval_dataset", "lora_rank",
]  # fmt: skip


def shared_flags():
    """{name: {script: (type, help)}} of flags that more than one script has."""
    flags = {}
    for name in SCRIPTS:
        Args = importlib.import_module(name).Args
        helps = plumbing._help_texts(Args)
        for field in Args.__dataclass_fields__.values():
            kind = field.type
            if typing.get_origin(kind) is typing.Literal:
                kind = frozenset(typing.get_args(kind))
            flags.setdefault(field.name, {})[name] = (kind, helps[field.name])
    return {name: of for name, of in flags.items() if len(of) > 1}


def test_a_shared_flag_has_one_type():
    """But --loss, by which each script chooses among its own losses."""
    for name, of in shared_flags().items():
        assert name == "loss" or len({kind for kind, _ in of.values()}) == 1, (name, of)


@pytest.mark.parametrize("name", ONE_MEANING)
def test_a_shared_flag_has_one_meaning(name):
    texts = {script: text for script, (_, text) in shared_flags()[name].items()}
    if name == "reward_model":
        texts.pop("judge")  # which compares with one, and has no --reward
    assert len(set(texts.values())) == 1


def test_every_flag_has_help():
    """A phrase that a stranger understands alone: of three words or more."""
    for script in SCRIPTS:
        Args = importlib.import_module(script).Args
        for flag, text in plumbing._help_texts(Args).items():
            assert len(text.split()) > 2, (script, flag, text)
