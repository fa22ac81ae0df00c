"""DPO + NLL: direct preference optimisation with the chosen completion's likelihood in the loss.

Rafailov et al. 2023 (DPO, arXiv:2305.18290); Pang et al. 2024 (Iterative RPO, arXiv:2404.19733).
Raise log(pi / pi_ref) of the better completion above that of the worse one; the negative
log-likelihood (NLL) of the better one, added to the loss, keeps it likely.

Read beside the RLHF Book, draft of January 2025 (the printed edition has chapter 12 as chapter 8
and chapter 8 as chapter 15). c and w (chosen, winner) are the better completion, r and l (rejected,
loser) the worse one:
    dpo_nll_loss  8.2: the whole formula
    dpo_loss      8.2, 12: its first term; with a margin 8.3; cDPO (conservative) smooths labels;
                  with a soft label 13.2.2
    nll_loss      8.2: its second term
    rpo_loss      8.3: reward-aware preference optimisation (Nemotron-4, arXiv:2406.11704), which is
                  not Iterative RPO, iterative reasoning preference optimisation
    rebel_loss    8.3: regression to the rewards' difference (REBEL, arXiv:2404.16767)
    ipo_loss      arXiv:2310.12036, not in the book

How the code departs from the print:
    1. 8.2 prints the second log-ratio with the winner's completion. It is the loser's. There c is
       the reasoning and y the answer, M_theta is pi and M_t the reference; here y is both, c + y.
    2. 8.3 prints the margin, of a reward model, outside the sigmoid, where it has no gradient. It
       is inside, also in DPO.
    3. Only the NLL is divided by the completion's length; DPO sums over its tokens.
    4. IPO sums over tokens here. Its authors' code takes the mean: --normalize-length.
    5. 8.3 only names RPO and REBEL. The formulas are their papers'. The code of REBEL's authors
       minimises eta squared times what their paper, and this file, has.

    python dpo_nll.py                                     # the toy's pairs, in half a minute
    python dpo_nll.py --iterations 3 --dataset toy/problems_train.jsonl        # Iterative RPO
    python dpo_nll.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset preferences.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py, and pass --model and --dataset.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, get_scheduler

from common import (
    add_up,
    add_up_gradients,
    completion_logps,
    deal_out,
    encode,
    encode_answers,
    fixed_logps,
    generate,
    process,
)
from plumbing import (
    Run,
    answer_text,
    check_finite,
    check_prompts,
    check_texts,
    count_steps,
    greedy_rewards,
    hold_as_computed,
    is_verified,
    kl_from_start,
    last_number,
    load_model,
    load_reward,
    load_rows,
    load_splits,
    load_tokenizer,
    pick_device,
    reference_of,
    run_script,
    show_batch,
    soft_label,
    stop,
    stop_on_error,
    with_ended,
)


@dataclass
class Args:
    model: str  # policy to train, and its first reference: a folder, or a name on the hub
    dataset: str
    """training rows, JSON Lines or owner/name:split on the hub: `prompt`, `chosen`, `rejected`, for
    some losses `margin`, `probability` (that the chosen one is the better one) or `score_chosen`,
    `score_rejected`; for --iterations `prompt`, and `answer` for the verifier"""
    eval_dataset: str = ""
    """held-out rows of the same form; if empty, --eval-size prompts are taken from --dataset"""
    eval_prompts: str = ""
    """rows with `prompt`, and what --reward reads: they are answered greedily at each evaluation"""
    show_rows: int = 0
    """number of rows to print as the model gets them, with the places where the loss counts; then
    the program ends; 0: train"""

    output_dir: str = "runs/dpo_nll"  # folder for metrics, pairs, samples, checkpoint, final model
    resume: bool = False  # continue from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed for shuffling and sampling
    device: str = "auto"  # torch device; auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the forward pass, while weights are float32; auto: bfloat16 if cuda supports it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time, prompts are not shared"""
    shard: bool = False
    """divide weights, gradients and optimiser states among the processes of torchrun (FSDP)"""
    share_prompts: bool = True
    """compute a prompt once for all of its completions; the result is the same"""

    loss: Literal["dpo", "ipo", "rpo", "rebel"] = "dpo"  # the preference term
    beta: float = 0.1
    """scale of the implicit rewards in dpo, ipo and rpo (Pang et al.: 0.1)"""
    alpha: float = 1.0
    """weight of the NLL of the chosen completion (Pang et al.: 1); 0: no such term, plain DPO"""
    margin_scale: float = 0.0  # factor of a row's `margin` in dpo (8.3)
    label_smoothing: float = 0.0  # chance that a pair is the wrong way round, in dpo (cDPO)
    eta: float = 1.0  # scale of the rows' rewards in rpo and rebel
    normalize_length: bool = False
    """divide a completion's log-prob by its number of tokens (Tulu 3, with beta 5)"""
    precompute_ref: bool = True
    """keep the reference's log-probs; if false, keep the model: the result is the same"""

    reward: str = "verifier"
    """for --iterations and --eval-prompts. verifier: 1 if the last number of the completion is the
    row's `answer`, else 0; or FILE.py:function, which gets three lists (prompts, completions, rows)
    and returns one number per completion; rows[i]["ended"] is False if completion i was cut off,
    and rows[i]["raw"] is its text with special tokens"""
    reward_model: str = ""  # folder or hub name of a reward model, used instead of --reward

    iterations: int = 0
    """rounds of sampling, pairing by reward and training, each with the policy it begins with as
    its reference; 0: train on the pairs of --dataset"""
    num_prompts: int = 1024  # prompts sampled from per iteration
    num_generations: int = 8  # completions sampled per prompt (Pang et al.: 30)
    num_pairs: int = 1024  # pairs per iteration, each of a better and a worse completion
    max_new_tokens: int = 256  # longest completion that is sampled, in tokens
    temperature: float = 1.0  # temperature of sampling (Pang et al.: 0.8)

    num_epochs: int = 1  # passes over the pairs, in each iteration
    batch_size: int = 64  # pairs per step (Tulu 3: 128)
    micro_batch_size: int = 8  # completions per forward pass; changes memory, not the gradient
    max_length: int = 1024
    """most tokens of a prompt and its completion together; longer completions are cut"""
    learning_rate: float = 7e-7  # peak learning rate of AdamW (Pang et al.: 7e-7)
    lora_rank: int = 0
    """rank of the adapters that are trained in place of the weights (LoRA), with about ten times
    the learning rate; 0: all weights are trained; see docs/models.md"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule after the warm-up; linear and cosine fall to 0"""
    warmup_ratio: float = 0.1  # fraction of the steps used for linear warm-up (Tulu 3: 0.1)
    max_grad_norm: float = 1.0  # maximum norm of the gradient; a larger one is scaled down to it

    eval_size: int = 64
    """number of prompts held out of --dataset, at most a tenth, without --eval-dataset; and number
    of rows of --eval-prompts that are used; 0: none"""
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints
    log_samples: int = 4  # completions per evaluation written to samples.jsonl


TOY = dict(
    model="toy/model",
    dataset="toy/pref_train.jsonl",
    eval_dataset="toy/pref_test.jsonl",
    eval_prompts="toy/problems_test.jsonl",
    eval_size=500,
    max_new_tokens=48,
    micro_batch_size=128,
    learning_rate=1e-4,
)

# --- The algorithm --------------------------------------------------------------------------------
# All (N,): log-probs of whole completions. The implicit reward of one is beta log(pi / pi_ref).


def log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected):
    """delta = log pi/ref(y_c) - log pi/ref(y_r): four times (N,) -> (N,). Book 8.2."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, beta, margin=0.0, label_smoothing=0.0, probability=1
):
    """-log sigmoid(beta delta - m), mean over pairs -> scalar. Book 8.2; 8.3 with margin m (N,).

    With label smoothing e: -(1 - e) log sigmoid(z) - e log sigmoid(-z), z = beta delta - m (cDPO).
    With a soft label p (N,), the probability that the chosen completion is the better one, e is the
    chance that it is not, 1 - p: book 13.2.2. With both, e is the chance that just one is wrong.
    """
    z = beta * log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected) - margin
    wrong = probability * label_smoothing + (1 - probability) * (1 - label_smoothing)
    losses = -(1 - wrong) * F.logsigmoid(z) - wrong * F.logsigmoid(-z)
    return losses.mean()


def nll_loss(logps, mask):
    """-1/|y| sum_t log pi(y_t), mean over completions: logps, mask (N, T) -> scalar. Book 8.2.

    The length is that of the completion, without the prompt.
    """
    return -sequence_logps(logps, mask, normalize_length=True).mean()


def dpo_nll_loss(preference_loss, chosen_nll, alpha):
    """L = L_DPO + alpha L_NLL -> scalar. Book 8.2, one formula:

    -log sigmoid(beta [log pi/ref(y_c) - log pi/ref(y_r)]) - alpha log pi(y_c) / |y_c|,

    of which the first term is `dpo_loss` (or another preference loss), and the second is alpha
    times `nll_loss` of the chosen completions.
    """
    return preference_loss + alpha * chosen_nll


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(delta - 1 / (2 beta))^2, mean over pairs -> scalar. Azar et al. 2023."""
    delta = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return ((delta - 1 / (2 * beta)) ** 2).mean()


def rpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, eta, gap):
    """KL(Bernoulli(sigmoid(eta gap)) || Bernoulli(sigmoid(beta delta))), mean over pairs -> scalar.

    gap (N,): reward of the chosen completion less that of the rejected one. Book 8.3.
    """
    z = beta * log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    target = eta * gap
    log_ratio_right = F.logsigmoid(target) - F.logsigmoid(z)
    log_ratio_wrong = F.logsigmoid(-target) - F.logsigmoid(-z)
    kl = target.sigmoid() * log_ratio_right + (-target).sigmoid() * log_ratio_wrong
    return kl.mean()


def rebel_loss(chosen, rejected, ref_chosen, ref_rejected, eta, gap):
    """(delta / eta - gap)^2, mean over pairs -> scalar; gap as in `rpo_loss`. Book 8.3."""
    delta = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return ((delta / eta - gap) ** 2).mean()


def sequence_logps(logps, mask, normalize_length=False):
    """Log-probs of tokens, 0 in padding, and mask (R, T) -> log-probs of completions (R,).

    The sum over tokens; with normalize_length their mean.
    """
    if normalize_length:
        return logps.sum(1) / mask.sum(1)
    return logps.sum(1)


def pair_accuracy(delta):
    """Share of pairs (N,) in which delta is positive, zeros count half."""
    return ((delta > 0).float() + (delta == 0).float() / 2).mean()


# --- The task: change this for your own -----------------------------------------------------------


def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        rewards.append(float(last_number(text) == last_number(str(row["answer"]))))
    return rewards


def to_pair(row):
    """A row -> texts of the chosen and the rejected completion."""
    chosen = answer_text(row["chosen"], row["prompt"])
    rejected = answer_text(row["rejected"], row["prompt"])
    return chosen, rejected


# --- Pairs ----------------------------------------------------------------------------------------


def read_pairs(path, loss):
    """File -> list of {prompt, chosen, rejected, margin, gap, probability}.

    Bad rows are named and stop the run.
    """
    pairs = []
    needs_scores = loss in ("rpo", "rebel")
    columns = ["score_chosen", "score_rejected"] if needs_scores else []
    for number, row in enumerate(load_rows(path, "prompt", "chosen", "rejected", *columns), 1):
        with stop_on_error(f"{path}, row {number}: cannot be read"):
            chosen, rejected = to_pair(row)
            if not chosen.strip() or not rejected.strip():
                raise ValueError("an empty completion")
            margin = float(row.get("margin") or 0.0)
            gap = 0.0
            if needs_scores:
                gap = float(row["score_chosen"]) - float(row["score_rejected"])
            if not math.isfinite(margin + gap):
                raise ValueError(f"margin {margin}, difference of scores {gap}: not finite")
        pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        pairs.append(pair | {"margin": margin, "gap": gap, "probability": soft_label(row)})
    return pairs


def keep_different(pairs, tokenizer, max_length, name):
    """Leave out pairs that are equal, perhaps only when cut, or whose prompt fills max_length.

    Prints how many were dropped, and how many completions are cut.
    """
    kept = []
    num_cut = 0
    for pair in pairs:
        texts = [pair["chosen"], pair["rejected"]]
        prompt_ids, [chosen, rejected] = encode_answers(tokenizer, pair["prompt"], texts)
        room = max_length - len(prompt_ids)
        if room > 0 and chosen[:room] != rejected[:room]:
            kept.append(pair)
            num_cut += (len(chosen) > room) + (len(rejected) > room)
    num_dropped = len(pairs) - len(kept)
    if num_cut or num_dropped:
        print(
            f"{name}: of {len(pairs)} pairs, dropped {num_dropped}: equal, also when cut, or the "
            f"prompt fills --max-length {max_length}; cut {num_cut} completions"
        )
    if pairs and not kept:
        stop(f"{name}: no pair of two different completions")
    return kept


def sample_groups(policy, tokenizer, score, rows, args):
    """Sample and score --num-generations completions of each row's prompt.

    -> [(prompt, [(reward, text, ended), ...]), ...] without empty completions, and the metrics.
    """
    G = args.num_generations
    groups, rewards, all_ended = [], [], []
    size = max(1, args.micro_batch_size // G) * process()[1]  # prompts at a time
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        prompts = [row["prompt"] for row in part]
        sampling = (G, args.max_new_tokens, args.temperature)
        batch, texts, ended = generate(policy, tokenizer, prompts, *sampling)
        row_of_each = with_ended(part, ended, batch, tokenizer)
        values = score([row["prompt"] for row in row_of_each], texts, row_of_each)
        ended = ended.tolist()
        rewards += values
        all_ended += ended
        candidates = list(zip(values, texts, ended, strict=True))
        for i, prompt in enumerate(prompts):
            group = candidates[i * G : (i + 1) * G]
            groups.append((prompt, [candidate for candidate in group if candidate[1].strip()]))
    metrics = {
        "reward": sum(rewards) / len(rewards),
        "ended": sum(all_ended) / len(all_ended),
    }
    return groups, metrics


def sample_pairs(policy, tokenizer, score, rows, args):
    """-> --num-pairs pairs of a better and a worse completion of a prompt, and the metrics.

    Prompts whose completions all have one reward, or one text, make no pair; the others take turns.
    """
    groups, metrics = sample_groups(policy, tokenizer, score, rows, args)
    usable = []
    for prompt, group in groups:
        rewards_differ = len({reward for reward, _, _ in group}) > 1
        texts_differ = len({text for _, text, _ in group}) > 1
        if rewards_differ and texts_differ:
            usable.append((prompt, group))
    if not usable:
        stop("no prompt has two completions of different reward: nothing to learn from")
    metrics["no_signal"] = 1 - len(usable) / len(rows)
    pairs = []
    draw = random.Random(args.seed)
    while len(pairs) < args.num_pairs:
        prompt, group = usable[len(pairs) % len(usable)]
        # By reward: two of equal reward are skipped below
        worse, better = sorted(draw.sample(group, 2))
        low, rejected, rejected_ended = worse
        high, chosen, chosen_ended = better
        if low == high or chosen == rejected:
            continue
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 0.0}
        pairs.append(pair | {"gap": high - low, "ended": [chosen_ended, rejected_ended]})
    return pairs, metrics


def collate(pairs, tokenizer, max_length):
    """-> Batch, each chosen completion before its rejected one; labels (N, 3) for `pair_loss`:
    margin, gap of the scores, probability that the chosen one is the better one."""
    prompts = [pair["prompt"] for pair in pairs]
    completions = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    ended = []
    for pair in pairs:
        ended += pair.get("ended", [True, True])
    batch = encode(tokenizer, prompts, completions, max_length, ended)
    labels = [(pair["margin"], pair["gap"], soft_label(pair)) for pair in pairs]
    return batch, torch.tensor(labels)


def all_logps(model, tokenizer, pairs, max_length, args):
    """Log-probs of the chosen and the rejected completions, no gradient -> (N, 2) on the CPU."""
    rows = []
    for start in range(0, len(pairs), args.batch_size):
        part = pairs[start : start + args.batch_size]
        batch, _ = collate(part, tokenizer, max_length)
        batch = batch.to(model.device)
        logps = fixed_logps(model, batch, 1.0, args.micro_batch_size, args.share_prompts)
        rows.append(sequence_logps(logps, batch.completion_mask, args.normalize_length).cpu())
    return torch.cat(rows).view(-1, 2)


# --- Training -------------------------------------------------------------------------------------


def check_args(args, pairs):
    """Stop where flags contradict each other, or --margin-scale has nothing to scale."""
    if args.loss != "rebel" and not args.beta:
        stop("--beta 0: without it the loss does not see the policy")
    if args.lora_rank and not args.precompute_ref:
        stop("--no-precompute-ref keeps a second model, which --lora-rank is there to do without")
    if args.iterations and (args.num_generations < 2 or not args.temperature):
        stop(
            f"--num-generations {args.num_generations} --temperature {args.temperature}: a pair "
            "needs two sampled completions of a prompt"
        )
    if args.margin_scale:
        has_margins = any(pair["margin"] for pair in pairs)
        if args.loss != "dpo" or not has_margins:
            stop(
                "--margin-scale needs --loss dpo and pairs with `margin`, which sampled ones do "
                "not have"
            )
    if args.loss != "dpo" and any(pair["probability"] != 1 for pair in pairs):
        stop(f"{args.dataset}: `probability` goes with --loss dpo, not with {args.loss}")


def load_data(args, tokenizer, policy, max_length):
    """-> rows to sample from with --iterations, pairs, held-out pairs, rows to answer."""
    columns = ["prompt", "answer"] if is_verified(args) else ["prompt"]
    eval_rows = []
    if args.eval_prompts:
        eval_rows = load_rows(args.eval_prompts, *columns)[: args.eval_size]
    if args.iterations:
        return load_rows(args.dataset, *columns), [], [], eval_rows
    pairs, eval_pairs = load_splits(args, lambda path: read_pairs(path, args.loss))
    check_texts(tokenizer, policy, pairs + eval_pairs)
    pairs = keep_different(pairs, tokenizer, max_length, args.dataset)
    eval_name = args.eval_dataset or "held out"
    eval_pairs = keep_different(eval_pairs, tokenizer, max_length, eval_name)
    if args.show_rows:
        batch, _ = collate(pairs[: args.show_rows], tokenizer, max_length)
        show_batch(tokenizer, batch, batch.completion_mask)
    return [], pairs, eval_pairs, eval_rows


def pair_loss(four, args, margin, gap, probability):
    """The preference term that --loss names: four log-probs, margin, gap, probability (N,) ->
    scalar."""
    if args.loss == "dpo":
        margin = args.margin_scale * margin
        return dpo_loss(*four, args.beta, margin, args.label_smoothing, probability)
    if args.loss == "ipo":
        return ipo_loss(*four, args.beta)
    if args.loss == "rpo":
        return rpo_loss(*four, args.beta, args.eta, gap)
    return rebel_loss(*four, args.eta, gap)


def draw_pairs(policy, tokenizer, score, rows, args, iteration):
    """Pairs of an iteration, sampled from the policy as it is now, and the metrics."""
    draw = random.Random(f"{args.seed} {iteration}")
    drawn = draw.sample(rows, min(args.num_prompts, len(rows)))
    torch.manual_seed(draw.getrandbits(32))  # so that a resumed run samples the same
    pairs, metrics = sample_pairs(policy, tokenizer, score, drawn, args)
    return pairs, metrics | {"iteration": iteration}


def add_reference(pairs, policy, ref, tokenizer, max_length, args):
    """Make the policy as it is now the reference of these pairs -> pairs.

    Its weights go into `ref`; where there is no such model, its log-probs go into the pairs.
    """
    if ref:
        ref.load_state_dict(policy.state_dict())
        return pairs
    logps = all_logps(policy, tokenizer, pairs, max_length, args).tolist()
    return [pair | {"ref_logps": two} for pair, two in zip(pairs, logps, strict=True)]


def shuffled(num_pairs, args, iteration):
    """Places of the pairs of an iteration, each epoch in an order of its own."""
    order = []
    for epoch in range(args.num_epochs):
        shuffle = random.Random(f"{args.seed} {iteration} {epoch}")
        order += shuffle.sample(range(num_pairs), num_pairs)
    return order


def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for rewards that draw random numbers
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    model_options = (args.reward_model, device, args.dtype, args.micro_batch_size)
    score = load_reward(args.reward, verifier, *model_options, shard=args.shard)
    load_options = (AutoModelForCausalLM, args.model, device, args.dtype, args.shard)
    policy = load_model(*load_options, args.gradient_checkpointing, args.lora_rank)
    max_length = min(args.max_length, policy.context)
    rows, pairs, eval_pairs, eval_rows = load_data(args, tokenizer, policy, max_length)
    check_args(args, pairs)
    policy.context = max_length  # what is sampled must fit in training, too
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens, args.show_rows)
    num_pairs = args.num_pairs if args.iterations else len(pairs)
    ref = None if args.precompute_ref else hold_as_computed(load_model(*load_options))
    steps_per_iteration = count_steps(num_pairs * args.num_epochs, args)
    num_steps = steps_per_iteration * max(1, args.iterations)
    lr = args.learning_rate
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    warmup = round(args.warmup_ratio * num_steps)
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler}
    if ref:
        parts["ref"] = ref
    run.begin(parts, num_steps)
    run.describe(policy, len(rows or pairs), len(eval_pairs), f"{args.batch_size} pairs")
    reward_scale = 1 / args.eta if args.loss == "rebel" else args.beta  # of the implicit rewards

    def report():
        if not eval_pairs and not eval_rows:
            return
        start_model = reference_of(policy) or hold_as_computed(load_model(*load_options))
        metrics = {}
        if eval_pairs:
            logps = all_logps(policy, tokenizer, eval_pairs, max_length, args)
            start_logps = all_logps(start_model, tokenizer, eval_pairs, max_length, args)
            delta = log_ratio_difference(*logps.T, *start_logps.T)
            metrics["eval_pair_accuracy"] = pair_accuracy(delta)
            metrics["eval_margin"] = reward_scale * delta.mean()
        if eval_rows:
            sizes = (args.max_new_tokens, args.batch_size)
            values, texts = greedy_rewards(policy, tokenizer, score, eval_rows, *sizes)
            torch.manual_seed(args.seed)
            prompts = [row["prompt"] for row in eval_rows]
            sizes = (args.max_new_tokens, args.micro_batch_size)
            kl, _ = kl_from_start(policy, start_model, tokenizer, prompts, *sizes)
            name = "eval_accuracy" if is_verified(args) else "eval_reward"
            metrics[name] = sum(values) / len(values)
            metrics["eval_kl"] = kl.mean()
            run.samples(prompts, texts, values, held_out=True)
        run.log(metrics, "eval_accuracy", "eval_reward", "eval_pair_accuracy", "eval_kl")

    if run.step == 0:
        report()
    current = None
    for step in run.steps():
        start = time.time()
        # 1. Draw the pairs of this step; a new iteration has pairs and a reference of its own
        iteration, k = divmod(step - 1, steps_per_iteration)
        if k == 0:
            if args.iterations:
                found, metrics = draw_pairs(policy, tokenizer, score, rows, args, iteration)
                run.log(metrics, "reward")
            else:
                found = pairs
            current = add_reference(found, policy, ref, tokenizer, max_length, args)
            run.write_rows(f"pairs/{iteration}.jsonl", current)
        elif not current:  # resumed
            current = load_rows(run.folder / "pairs" / f"{iteration}.jsonl")
        order = shuffled(num_pairs, args, iteration)
        drawn = [current[i] for i in order[k * args.batch_size : (k + 1) * args.batch_size]]
        batch, labels = collate(drawn, tokenizer, max_length)
        batch, labels = batch.to(device), labels.to(device)
        if ref:
            ref_logps = all_logps(ref, tokenizer, drawn, max_length, args).to(device)  # (N, 2)
        else:
            ref_logps = torch.tensor([pair["ref_logps"] for pair in drawn]).to(device)

        # 2. Log-probs and loss; each micro-batch weighs as much as its share of the step's pairs
        totals = torch.zeros(2, device=device)  # loss, NLL
        logps = torch.zeros_like(ref_logps)
        for mb in deal_out(batch.split(args.micro_batch_size, whole_prompts=True), args.shard):
            part = batch.rows(mb)
            places = batch.prompt_of[mb][::2]  # of the pairs: chosen and rejected alternate
            token_logps = completion_logps(policy, part, 1.0, args.share_prompts)
            mask = part.completion_mask
            mb_logps = sequence_logps(token_logps, mask, args.normalize_length).view(-1, 2)
            four = (mb_logps[:, 0], mb_logps[:, 1], ref_logps[places, 0], ref_logps[places, 1])
            mb_loss = pair_loss(four, args, *labels[places].T)
            mb_nll = nll_loss(token_logps[::2], mask[::2])
            share = len(places) / len(drawn)
            mb_loss = dpo_nll_loss(mb_loss, mb_nll, args.alpha) * share
            mb_loss.backward()
            totals += torch.stack([mb_loss.detach(), mb_nll.detach() * share])
            logps[places] = mb_logps.detach()
        loss, nll = add_up(totals).tolist()
        add_up(logps)
        add_up_gradients(policy)

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        check_finite(loss, grad_norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 4. Log
        rewards = reward_scale * (logps - ref_logps)  # implicit, (N, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "loss": loss,
            "nll": nll,
            "margin": margin.mean(),
            "accuracy": pair_accuracy(margin),
            "reward_chosen": rewards[:, 0].mean(),
            "reward_rejected": rewards[:, 1].mean(),
            "logps_chosen": logps[:, 0].mean(),
            "logps_rejected": logps[:, 1].mean(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
            "tokens_per_second": batch.completion_mask.sum().item() / (time.time() - start),
        }
        run.log(metrics, "loss", "accuracy")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    run.finish(tokenizer, {"final": policy})


if __name__ == "__main__":
    run_script(main, Args, TOY)
