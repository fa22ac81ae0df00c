import re
p='tests/test_plumbing.py'; s=open(p).read()
def rep(a,b,n=1):
    global s
    assert s.count(a)>=1,a[:80]
    s=s.replace(a,b)
rep('"grpo.py: a b c"','"a b c"'); rep('"grpo.py: " + "x" * 500','"x" * 500')
i=s.index('def test_update_by_hand'); j=s.index('# --- The folder of a run: what is refused')
s=s[:i]+'''@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_is_refused(loss, norm):
    plumbing.check_finite(1.0, 2.0)
    text = message(plumbing.check_finite, loss, norm)
    assert f"the loss is {loss}" in text and f"the norm of the gradient {norm}" in text
    assert "--learning-rate" in text


'''+s[j:]
rep('''kl=math.nan) == ["step 6/60"]''','''kl=math.nan) == []''')
rep('''    run.bar = SimpleNamespace(set_postfix=shown.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert lines_of(run, capsys, 0, "kl", kl=1.0) == ["step 0/3  kl 1"] and shown == []
''','''    assert lines_of(run, capsys, 0, "kl", kl=1.0) == ["step 0/3  kl 1"] and shown == []
    run.bar = SimpleNamespace(set_postfix=shown.append, disable=False)
''')
i=s.index('def test_many_completions_without_an_end'); j=s.index('def test_samples_are_rows_of_their_step')
s=s[:i]+'''def test_many_completions_without_an_end_are_warned_of(tmp_path, capsys):
    """Once, in one line that names the remedy."""
    run = begun(tmp_path / "run")
    run.args.max_new_tokens = 7
    for metrics in ({}, {"ended": 0.8}, {"ended": torch.tensor(1.0)}):
        run.log(metrics)
    assert capsys.readouterr().err == ""
    run.log({"ended": torch.tensor(0.75)})
    run.log({"ended": torch.tensor(0.5)})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "25%" in lines[0] and "--max-new-tokens 7" in lines[0]


'''+s[j:]
rep('''    run = begun(tmp_path / "run")
    run.step = 2
    run.samples(["p"''','''    run = begun(tmp_path / "run")
    run.args.log_samples = 2
    run.step = 2
    run.samples(["p"''')
i=s.index('def test_curves_are_metrics_against'); j=s.index('def test_tokenizers_and_models_that_were_saved')
s=s[:i]+'''def test_curves_are_metrics_against_the_step(tmp_path, monkeypatch):
    """Each metric that varies has axes of its own, the important ones first; evaluations have marks."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []

    def plot(axes, x, y, marker):
        place = axes.get_subplotspec().num1
        drawn.append((place, axes.get_title(), list(x), list(y), marker, axes.get_xlabel()))

    monkeypatch.setattr(Axes, "plot", plot)
    run = begun(tmp_path / "run")
    rows = {0: {"eval_loss": 0.5}, 1: {"kl": 1.0, "a": 0.1}, 2: {"kl": 4.0, "a": 0.2}}
    for step, row in rows.items():
        run.step = step
        run.log(row | {"constant": 3.0})
    run.step = 7
    run.log({"eval_loss": 0.75, "once": 1.0})
    run.finish(Saved("tokenizer"), {})
    assert sorted(drawn) == [
        (0, "eval_loss", [0, 7], [0.5, 0.75], "o", "step"),
        (1, "kl", [1, 2], [1.0, 4.0], "", "step"),
        (2, "a", [1, 2], [0.1, 0.2], "", "step"),
    ]
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_histogram_of_labelled_values(tmp_path, monkeypatch):
    """One over the other, each with its label, in the same bins."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []

    def hist(axes, x, *args, **options):
        drawn.append((options["label"], torch.as_tensor(x).tolist(), options["range"]))

    monkeypatch.setattr(Axes, "hist", hist)
    run = begun(tmp_path / "run")
    run.histogram({"chosen": torch.tensor([1.0, 2.0]), "rejected": torch.tensor([-1.0])})
    assert drawn == [("chosen", [1.0, 2.0], (-1, 2)), ("rejected", [-1.0], (-1, 2))]
    assert (tmp_path / "run" / "reward_histogram.png").stat().st_size > 1000


'''+s[j:]
open(p,'w').write(s)
