"""Several processes under torchrun (gloo, on the CPU) compute what one process computes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(count, *command, **environment):
    """Run a script of ours in `count` processes, or by these words -> what subprocess.run gives."""
    words = [sys.executable] if count == 1 else [*TORCHRUN, str(count)]
    if isinstance(count, list):
        words = [*count]
    words += [str(word) for word in command]
    given = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, cwd=ROOT, env=given, **pipes) as ran:
        try:
            out, err = ran.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            ran.terminate()  # not killed: torchrun ends its processes, which may hang for good
            raise
    return subprocess.CompletedProcess(words, ran.returncode, out, err)


# --- The functions of common.py -------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{number of processes: what each of them computed}."""
    found = {}
    for count in (1, 3):
        folder = tmp_path_factory.mktemp(f"of {count}")
        ran = start(count, "tests/on_processes.py", folder)
        assert ran.returncode == 0, ran.stderr
        files = [folder / f"{number}.json" for number in range(count)]
        found[count] = [json.loads(file.read_text()) for file in files]
    return found


def test_every_process_has_the_whole(computed):
    """What is dealt out, and the number of the process, are its own; all else is equal."""
    first, *others = computed[3]
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {"dealt", "which", "held"}
        assert first["held"] > 4e5 and other["held"] == 0  # all of the model to be written, nothing
    assert [one["dealt"] for one in computed[3]] == [[0, 3], [1, 4], [2]]
    assert first["count"] == 3 and first["from first"] == 0
    assert first["sum"] == [3, 0 + 1 + 2] and first["gathered"] == [0, "x", 1, "x", 2, "x"]
    assert first["parts of an index"] == [[3, 2, 2], [1] * 8]
    which = [one["which"] for one in computed[3]]  # of five, for a sharded model
    assert which == [[[8, 9]], [[4, 5, 6, 7]], [[0, 1, 2, 3]]]
    assert first["other flags"] == "process 1 does not have the same seed as process 0"
    assert "2 micro-batches cannot be dealt out to 3" in first["few"]
    assert first["stopped"] == [1, 130]  # all end with the process that got a signal


def test_greedy_completions_and_log_probs_are_those_of_one_process(computed):
    [alone] = computed[1]
    for name in ("greedy", "ids", "ended", "alone", "after_greedy"):
        assert computed[3][0][name] == alone[name]
    for row, want in zip(computed[3][0]["logps"], alone["logps"], strict=True):
        assert row == pytest.approx(want, abs=1e-5)


def test_processes_draw_numbers_of_their_own(computed):
    """Twelve completions of one prompt: were the seeds equal, those of the processes would be."""
    sampled = computed[3][0]["sampled"]
    assert len(sampled) == 12
    by_process = [sampled[:6], sampled[6:9], sampled[9:]]
    assert by_process[1] != by_process[2] and by_process[0][:3] != by_process[1]
    parts = computed[3][0]["parts"]
    assert len(parts) == 12 and parts[6:9] != by_process[1]  # nor does the next call draw the same


# --- Every script ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Folders of the short runs that are asked for: in one process, in two, and in two --shard."""
    mine = [item for item in request.session.items if item.path == request.path]
    items = [item for item in mine if "runs" in item.fixturenames]
    hows = {"one"} | {item.callspec.params["how"] for item in items}
    asked = {item.callspec.params["case"] for item in items}
    asked |= {small_runs.CASES[case][1].get("reward_model") for case in asked}
    cases = [case for case in small_runs.CASES if case in asked]
    folders = {}
    for name, count, *flags in (("one", 1), ("two", 2), ("sharded", 2, "--shard")):
        folders[name] = tmp_path_factory.mktemp(name)
        if flags:
            cases = [case for case in cases if case not in small_runs.NOT_SHARDED]
        if name not in hows or not cases:
            continue
        ran = start(count, "tests/small_runs.py", folders[name], *flags, *cases)
        assert ran.returncode == 0, ran.stderr
        said = [line for line in ran.stdout.splitlines() if line.startswith("saved ")]
        assert len(said) == len(cases)  # the first process alone prints
    return folders


PAIRS = [(case, "two") for case in small_runs.CASES]
PAIRS += [(case, "sharded") for case in small_runs.CASES if case not in small_runs.NOT_SHARDED]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case, how", PAIRS)
def test_two_processes_train_as_one(case, how, runs):
    """Loss, gradient norm and all other metrics of three steps, and the weights after them."""
    ours, theirs = metrics_of(runs[how] / case), metrics_of(runs["one"] / case)
    assert len(ours) == len(theirs) >= 3
    assert len({row["loss"] for row in theirs if "loss" in row}) > 1
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        if abs(their.get("margin", 1)) < 1e-5:  # all margins of a first step are rounding errors
            our.pop("accuracy")
        for name in our.keys() - {"seconds", "tokens_per_second", "eval_kl", "eval_kl_control"}:
            assert our[name] == pytest.approx(their[name], rel=5e-4, abs=2e-6), name
    for name in ("final", "critic"):
        path = Path(name) / "model.safetensors"
        if not (runs["one"] / case / path).exists():
            continue
        ours, theirs = load_file(runs[how] / case / path), load_file(runs["one"] / case / path)
        assert ours.keys() == theirs.keys()
        square = sum(((ours[key] - theirs[key]) ** 2).sum().item() for key in theirs)
        size = sum((theirs[key] ** 2).sum().item() for key in theirs)
        assert math.sqrt(square / size) < 1e-5
        config = json.loads((runs[how] / case / name / "config.json").read_text())
        assert not config["architectures"][0].startswith("FSDP")


# --- Runs from the command line -------------------------------------------------------------------

REWARD = """
import os

calls = []

def score(prompts, completions, rows):
    calls.append(1)
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{os.environ.get('RANK', '0')}\\n")
    if len(calls) == int(os.environ.get("FAILS_AT", 0)):
        raise RuntimeError("no judge today")
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""
SMALL = (
    "--model toy/model --dataset toy/problems_train.jsonl --num-steps 4 --num-prompts 4 "
    "--num-generations 3 --max-new-tokens 12 --eval-size 0 --checkpoint-every 2 "
    "--micro-batch-size 4 --learning-rate 1e-3 --num-epochs 2 --num-minibatches 2"
).split()


@pytest.fixture
def grpo(tmp_path):
    """Start grpo.py in some processes, with the reward above -> what subprocess.run gives."""
    (tmp_path / "mine.py").write_text(REWARD)

    def run(count, *flags, **environment):
        reward = ["--reward", f"{tmp_path}/mine.py:score"]
        calls = {"CALLS": str(tmp_path / "calls")}
        return start(count, "grpo.py", *SMALL, *reward, *flags, **calls, **environment)

    return run


def one_line(ran):
    """The only line with our script's name: torchrun adds a report of its own."""
    assert ran.returncode != 0
    said = [line for line in ran.stderr.splitlines() if line.startswith("grpo.py: ")]
    assert len(said) == 1 and ran.stderr.count("grpo.py: ") == 1, ran.stderr  # two may share a line
    for name in ("grpo.py", "plumbing.py", "common.py"):  # no traceback of ours
        assert f'{ROOT / name}", line' not in ran.stderr
    return said[0]


def test_a_run_that_fails_in_one_process_ends_and_resumes(grpo, tmp_path):
    """On two processes bit for bit; a checkpoint of two also goes on with one."""
    whole = grpo(2, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert set((tmp_path / "calls").read_text().split()) == {"0"}  # one process asks the judge
    final = (tmp_path / "whole/final/model.safetensors").read_bytes()
    assert "2 processes" in whole.stdout and whole.stdout.count("saved ") == 1
    broken = ["--output-dir", tmp_path / "broken"]
    assert "no judge today" in one_line(grpo(2, *broken, FAILS_AT="4"))
    assert [row["step"] for row in metrics_of(tmp_path / "broken")] == [1, 2, 3]
    (tmp_path / "broken").rename(tmp_path / "kept")
    for count in (2, 1):
        subprocess.run(["cp", "-r", tmp_path / "kept", tmp_path / "broken"], check=True)
        ran = grpo(count, *broken, "--resume")
        assert ran.returncode == 0, ran.stderr
        assert [row["step"] for row in metrics_of(tmp_path / "broken")] == [1, 2, 3, 4]
        same = (tmp_path / "broken/final/model.safetensors").read_bytes() == final
        assert same == (count == 2)  # one process samples other completions than two
        (tmp_path / "broken").rename(tmp_path / f"of {count}")


def test_a_sharded_run_resumes(grpo, tmp_path):
    """Bit for bit, weights and the moments of AdamW; not without --shard."""
    flags = ["--shard", "--beta", "0.1", "--output-dir"]
    whole = grpo(2, *flags, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "no judge today" in one_line(grpo(2, *flags, tmp_path / "broken", FAILS_AT="4"))
    ran = grpo(2, *flags, tmp_path / "broken", "--resume")
    assert ran.returncode == 0, ran.stderr
    finals = [tmp_path / name / "final/model.safetensors" for name in ("whole", "broken")]
    assert finals[0].read_bytes() == finals[1].read_bytes()
    without = ["--beta", "0.1", "--output-dir", tmp_path / "broken", "--resume"]
    assert "began with --shard True, not False" in one_line(grpo(2, *without))


def test_shard_does_not_go_with_adapters(grpo, tmp_path):
    assert "--shard does not go with --lora-rank" in one_line(
        grpo(2, "--shard", "--lora-rank", "2", "--output-dir", tmp_path / "run")
    )


def test_more_processes_than_prompts(grpo, tmp_path):
    said = one_line(grpo(2, "--num-prompts", "1", "--num-minibatches", "1"))
    assert "--num-prompts 1: fewer than the 2 processes" in said


def test_a_second_attempt_of_torchrun_does_not_wait_for_the_first(grpo, tmp_path):
    """With --max-restarts: it finds the folder of the first, and says so."""
    attempts = [*TORCHRUN[:-1], "--max-restarts", "1", "--nproc-per-node", "2"]
    ran = grpo(attempts, "--output-dir", tmp_path / "run", FAILS_AT="2")
    assert ran.returncode != 0
    assert "no judge today" in ran.stderr and "--overwrite" in ran.stderr


def test_processes_that_torchrun_did_not_start(tmp_path):
    """As a cluster starts them: the first has the store that the others ask."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((ROOT / "toy/sft_train.jsonl").read_text().splitlines(True)[:16]))
    command = [sys.executable, "sft.py", "--model", "toy/model", "--dataset", str(rows)]
    command += ["--num-epochs", "1", "--batch-size", "8", "--eval-size", "0"]
    command += ["--output-dir", str(tmp_path / "run")]
    given = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    both = []
    for number in ("0", "1"):
        both.append(subprocess.Popen(command, cwd=ROOT, env=given | {"RANK": number}))
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    assert (tmp_path / "run/final").exists()


def test_a_world_size_that_something_else_left(tmp_path):
    ran = start(1, "sft.py", "--help", WORLD_SIZE="2")
    assert ran.returncode == 0 and "--model" in ran.stdout


def test_bad_flags_are_said_once(grpo, tmp_path):
    ran = grpo(2, "--no-such-flag")
    assert ran.returncode != 0
    assert (ran.stdout + ran.stderr).count("--no-such-flag") == 1
