"""DPO + NLL: direct preference optimisation with the chosen completion's likelihood in the loss.

Rafailov et al. 2023 (DPO, arXiv:2305.18290); Pang et al. 2024 (Iterative RPO, arXiv:2404.19733).
Read beside the RLHF Book (draft of January 2025; "Direct Alignment" in later editions):
    dpo_loss      8.2, 12: DPO on sums of log-probs; with a margin 8.3; label smoothing is cDPO
    nll_loss      8.2: the second term of DPO + NLL
    rpo_loss      8.3: reward-aware (Nemotron-4, arXiv:2406.11704)
    rebel_loss    8.3: regression to the rewards' difference (arXiv:2404.16767)
    ipo_loss      arXiv:2310.12036, not in the book

Differs from the print:
    1. 8.2 prints the second log-ratio with the chosen completion. It is the rejected one's.
    2. 8.3 prints the margin outside the sigmoid, where it has no gradient. It is inside.
    3. Only the NLL is divided by the completion's length; DPO sums over its tokens.

    python dpo_nll.py                                     # the toy's pairs, in a minute
    python dpo_nll.py --iterations 3 --dataset toy/problems_train.jsonl        # Iterative RPO
    python dpo_nll.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset preferences.jsonl

To use it elsewhere, copy this file, common.py and plumbing.py.
"""
import math
import random
import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, get_scheduler

from common import (Run, answer_text, check_prompts, completion_logps, encode, encode_prompt,
                    fixed_logps, generate, greedy_rewards, kl_from_start, load_model, load_reward,
                    load_rows, load_splits, load_tokenizer, parse_args, pick_device, stop,
                    stop_on_error, update, with_ended)

@dataclass
class Args:
    model: str  # policy to train, and its first reference: a folder or a name on the hub
    dataset: str
    """JSON Lines or owner/name:split of the hub: `prompt`, `chosen`, `rejected`, for some losses
    `margin` or `score_chosen`, `score_rejected`; for --iterations `prompt` and `answer`"""
    eval_dataset: str = ""  # held-out rows of the same form; else --eval-size prompts of --dataset
    eval_prompts: str = ""  # rows with `prompt` and what --reward reads, for greedy answers
    output_dir: str = "runs/dpo_nll"  # folder of the run: metrics, pairs, checkpoint, final model
    resume: bool = False  # go on from the checkpoint in --output-dir, with the same flags
    overwrite: bool = False  # replace the run in --output-dir
    seed: int = 0  # seed of the data's order and of sampling
    device: str = "auto"  # torch device; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass (autocast; the weights are float32); auto: bfloat16 where cuda has it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time (no shared prompts)"""
    share_prompts: bool = True  # a prompt is computed once for all its completions: same result

    loss: Literal["dpo", "ipo", "rpo", "rebel"] = "dpo"  # the preference term
    beta: float = 0.1  # of dpo, ipo and rpo: scale of the implicit rewards (Pang 2024: 0.1)
    alpha: float = 1.0  # weight of the NLL of the chosen completion (Pang 2024: 1); 0: plain DPO
    margin_scale: float = 0.0  # of dpo: factor of a row's `margin` (8.3)
    label_smoothing: float = 0.0  # of dpo: chance that a pair is the wrong way round (cDPO)
    eta: float = 1.0  # of rpo and rebel: scale of the rows' rewards
    normalize_length: bool = False  # divide a completion's log-prob by its tokens (Tulu 3, beta 5)
    precompute_ref: bool = True  # keep the reference's log-probs; no: the model; same result

    iterations: int = 0  # rounds: sample, pair by reward, train, be the reference; 0: --dataset
    reward: str = "verifier"
    """verifier: is `answer` the last number? Or FILE.py:function(prompts, completions, rows)"""
    reward_model: str = ""  # folder of a reward model, used in place of --reward
    num_prompts: int = 1024  # prompts sampled an iteration
    num_generations: int = 8  # completions sampled of each (Pang 2024: 30)
    num_pairs: int = 1024  # pairs made of them, a better and a worse completion of one prompt each
    max_new_tokens: int = 256  # longest completion
    temperature: float = 1.0  # of sampling (Pang 2024: 0.8)

    num_epochs: int = 1  # passes over the pairs, in each iteration
    batch_size: int = 64  # pairs a step (Tulu 3: 128)
    micro_batch_size: int = 8  # completions a forward pass; changes the memory, not the gradient
    max_length: int = 1024  # tokens of prompt and completion; longer completions are cut
    learning_rate: float = 7e-7  # peak of AdamW's (Pang 2024: 7e-7)
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    warmup_ratio: float = 0.1  # share of the steps in which it rises from 0 (Tulu 3: 0.1)
    max_grad_norm: float = 1.0  # largest norm of the gradient; longer ones are scaled down to it

    eval_size: int = 64  # prompts held out, at most a tenth; and first rows of --eval-prompts
    eval_every: int = 100  # steps between evaluations; also before the first and after the last
    checkpoint_every: int = 100  # steps between checkpoints
    log_samples: int = 4  # completions an evaluation that go into samples.jsonl

TOY = dict(model="toy/model", dataset="toy/pref_train.jsonl", eval_dataset="toy/pref_test.jsonl",
           eval_prompts="toy/problems_test.jsonl", eval_size=500, max_new_tokens=48,
           micro_batch_size=128, learning_rate=1e-4)

# --- The algorithm --------------------------------------------------------------------------------
# All (N,): log-probs of whole completions. The implicit reward of one is beta log(pi / pi_ref).

def log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected):
    """delta = log pi/ref(y_c) - log pi/ref(y_r): four times (N,) -> (N,). Book 8.2."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, margin=0.0, label_smoothing=0.0):
    """-log sigmoid(beta delta - m), mean over pairs -> scalar. Book 8.2; 8.3 with margin m (N,).

    With label smoothing e, -(1 - e) log sigmoid(z) - e log sigmoid(-z) (cDPO).
    """
    z = beta * log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected) - margin
    return -((1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)).mean()

def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(delta - 1 / (2 beta))^2, mean over pairs -> scalar. Azar et al. 2023."""
    delta = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return ((delta - 1 / (2 * beta)) ** 2).mean()

def rpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, eta, gap):
    """KL(Bernoulli(sigmoid(eta gap)) || Bernoulli(sigmoid(beta delta))), mean over pairs -> scalar.

    gap (N,): reward of the chosen completion less that of the rejected one. Book 8.3.
    """
    z, target = beta * log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected), eta * gap
    right = F.logsigmoid(target) - F.logsigmoid(z)
    wrong = F.logsigmoid(-target) - F.logsigmoid(-z)
    return (target.sigmoid() * right + (-target).sigmoid() * wrong).mean()

def rebel_loss(chosen, rejected, ref_chosen, ref_rejected, eta, gap):
    """(delta / eta - gap)^2, mean over pairs -> scalar; gap as in `rpo_loss`. Book 8.3."""
    delta = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return ((delta / eta - gap) ** 2).mean()

def nll_loss(logps, mask):
    """-1/|y| sum_t log pi(y_t), mean over completions: logps, mask (N, T) -> scalar. Book 8.2."""
    return -sequence_logps(logps, mask, normalize_length=True).mean()

def sequence_logps(logps, mask, normalize_length=False):
    """Log-probs of tokens, 0 in padding, and mask (R, T) -> those of completions (R,): the sum."""
    return logps.sum(1) / (mask.sum(1) if normalize_length else 1)

# --- The task: change this for your own -----------------------------------------------------------

def verifier(prompts, completions, rows):
    """1.0 where the last number of the completion equals the row's `answer`, else 0.0."""
    rewards = []
    for text, row in zip(completions, rows, strict=True):
        last = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) or ["nan"])[-1]
        answer = str(row["answer"]).replace(",", "")
        rewards.append(float(float(last.replace(",", "")) == float(answer)))
    return rewards

def to_pair(row):
    """A row -> texts of the chosen and the rejected completion."""
    return [answer_text(row[side], row["prompt"]) for side in ("chosen", "rejected")]

# --- Training -------------------------------------------------------------------------------------

def read_pairs(path, loss):
    """File -> list of {prompt, chosen, rejected, margin, gap}."""
    pairs, columns = [], ["score_chosen", "score_rejected"] * (loss in ("rpo", "rebel"))
    for n, row in enumerate(load_rows(path, "prompt", "chosen", "rejected", *columns), 1):
        with stop_on_error(f"{path}, row {n}: cannot be read"):
            chosen, rejected = to_pair(row)
            if not chosen.strip() or not rejected.strip():
                raise ValueError("an empty completion")
            gap = float(row["score_chosen"]) - float(row["score_rejected"]) if columns else 0.0
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected,
                          "margin": float(row.get("margin") or 0.0), "gap": gap})
    return pairs

def keep_different(pairs, tokenizer, max_length, name):
    """Leave out pairs that are equal, at the latest when cut, or whose prompt fills max_length;
    says how many, and how many completions are cut."""
    kept, cut = [], 0
    for pair in pairs:
        room = max_length - len(encode_prompt(tokenizer, pair["prompt"]))
        ids = tokenizer([pair["chosen"], pair["rejected"]], add_special_tokens=False)["input_ids"]
        if room > 0 and ids[0][:room] != ids[1][:room]:
            kept.append(pair)
            cut += sum(len(x) >= room for x in ids)
    if cut or len(kept) < len(pairs):
        print(f"{name}: of {len(pairs)} pairs, dropped {len(pairs) - len(kept)}: equal, also when "
              f"cut, or the prompt fills --max-length {max_length}; cut {cut} completions")
    return kept or (pairs and stop(f"{name}: no pair of two different completions"))

def sample_pairs(policy, tokenizer, score, rows, args):
    """-> --num-pairs pairs of a better and a worse completion of a prompt, metrics. Prompts whose
    completions all have one reward make none; the others take turns."""
    groups, rewards, all_ended = [], [], []
    size = max(1, args.micro_batch_size // args.num_generations)  # prompts at a time
    for part in (rows[i:i + size] for i in range(0, len(rows), size)):
        _, texts, ended = generate(policy, tokenizer, [row["prompt"] for row in part],
                                   args.num_generations, args.max_new_tokens, args.temperature)
        of_each = with_ended([row for row in part for _ in range(args.num_generations)], ended)
        values = score([row["prompt"] for row in of_each], texts, of_each)
        rewards += values
        all_ended += ended.tolist()
        for i, row in enumerate(part):
            here = slice(i * args.num_generations, (i + 1) * args.num_generations)
            group = zip(values[here], texts[here], ended[here].tolist(), strict=True)
            group = [x for x in group if x[1].strip()]
            if min(len({x[k] for x in group}) for k in (0, 1)) > 1:  # rewards, and texts, differ
                groups.append((row["prompt"], group))
    if not groups:
        stop("no prompt has two completions of different reward: nothing to learn from")
    pairs, draw = [], random.Random(args.seed)
    while len(pairs) < args.num_pairs:
        prompt, group = groups[len(pairs) % len(groups)]
        (low, rejected, low_ended), (high, chosen, high_ended) = sorted(draw.sample(group, 2))
        if low < high and chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 0.0,
                          "gap": high - low, "ended": [high_ended, low_ended]})
    return pairs, {"reward": sum(rewards) / len(rewards), "no_signal": 1 - len(groups) / len(rows),
                   "ended": sum(all_ended) / len(all_ended)}

def collate(pairs, tokenizer, max_length):
    """-> Batch, the chosen completion of each pair before the rejected one; margins, gaps (N,)."""
    batch = encode(tokenizer, [pair["prompt"] for pair in pairs],
                   [[pair["chosen"], pair["rejected"]] for pair in pairs], max_length,
                   [x for pair in pairs for x in pair.get("ended", [True, True])])
    return batch, *(torch.tensor([pair[key] for pair in pairs]) for key in ("margin", "gap"))

def all_logps(model, tokenizer, pairs, max_length, args):
    """Log-probs of the chosen and the rejected completions, no gradient -> (N, 2) on the CPU."""
    rows = []
    for i in range(0, len(pairs), args.batch_size):
        batch = collate(pairs[i:i + args.batch_size], tokenizer, max_length)[0].to(model.device)
        logps = fixed_logps(model, batch, 1.0, args.micro_batch_size, args.share_prompts)
        rows.append(sequence_logps(logps, batch.completion_mask, args.normalize_length).cpu())
    return torch.cat(rows).view(-1, 2)

def main(args: Args):
    run = Run(args)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for a --reward of yours
    device, tokenizer = pick_device(args.device), load_tokenizer(args.model)
    score = load_reward(args.reward, verifier, args.reward_model, device, args.dtype,
                        args.micro_batch_size)
    verified = args.reward == "verifier" and not args.reward_model
    columns = ("prompt", "answer") if verified else ("prompt",)
    load = AutoModelForCausalLM, args.model, device, args.dtype
    policy = load_model(*load, args.gradient_checkpointing)
    max_length = min(args.max_length, policy.context)
    eval_rows = load_rows(args.eval_prompts, *columns)[:args.eval_size] if args.eval_prompts else []
    rows = load_rows(args.dataset, *columns) if args.iterations else []
    pairs, eval_pairs = ([], []) if args.iterations else load_splits(
        args, lambda path: read_pairs(path, args.loss))
    pairs = keep_different(pairs, tokenizer, max_length, args.dataset)
    eval_pairs = keep_different(eval_pairs, tokenizer, max_length, args.eval_dataset or "held out")
    if args.margin_scale and (args.loss != "dpo" or not any(pair["margin"] for pair in pairs)):
        stop("--margin-scale needs --loss dpo and pairs with `margin`, which sampled ones have not")
    policy.context = max_length  # what is sampled must fit in training, too
    check_prompts(tokenizer, policy, rows + eval_rows, args.max_new_tokens)
    num_pairs = args.num_pairs if args.iterations else len(pairs)
    ref = None if args.precompute_ref else load_model(*load)
    steps_each = math.ceil(num_pairs * args.num_epochs / args.batch_size)  # in an iteration
    num_steps = steps_each * max(1, args.iterations)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0,
                                  fused=True)
    warmup = round(args.warmup_ratio * num_steps)
    schedule = args.lr_schedule if args.lr_schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, warmup, num_steps)
    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler}
    run.begin(parts | ({"ref": ref} if ref else {}), num_steps)

    scale = 1 / args.eta if args.loss == "rebel" else args.beta  # of the implicit rewards

    def report():
        if not (eval_pairs or eval_rows):
            return
        start, metrics = load_model(*load), {}
        if eval_pairs:
            logps, ref_logps = (all_logps(m, tokenizer, eval_pairs, max_length, args)
                                for m in (policy, start))
            delta = log_ratio_difference(*logps.T, *ref_logps.T)
            metrics |= {"eval_pair_accuracy": ((delta > 0).float() + (delta == 0) / 2).mean(),
                        "eval_margin": scale * delta.mean()}
        if eval_rows:
            values = greedy_rewards(policy, tokenizer, score, eval_rows, args.max_new_tokens,
                                    args.batch_size)
            torch.manual_seed(args.seed)
            prompts = [row["prompt"] for row in eval_rows]
            kl, texts = kl_from_start(policy, start, tokenizer, prompts, args.max_new_tokens,
                                      args.micro_batch_size)
            metrics |= {"eval_accuracy" if verified else "eval_reward": sum(values) / len(values),
                        "eval_kl": kl.mean()}
            run.samples(*(x[:args.log_samples] for x in (prompts, texts)))
        run.log(metrics, "eval_accuracy", "eval_reward", "eval_pair_accuracy", "eval_kl")

    def new_pairs(iteration):
        """Pairs of an iteration; the policy as it is now is their reference."""
        if args.iterations:
            here = random.Random(f"{args.seed} {iteration}")
            drawn = here.sample(rows, min(args.num_prompts, len(rows)))
            torch.manual_seed(here.getrandbits(32))  # so that a resumed run samples the same
            found, metrics = sample_pairs(policy, tokenizer, score, drawn, args)
            run.log(metrics | {"iteration": iteration}, "reward")
        else:
            found = pairs
        if ref:
            ref.load_state_dict(policy.state_dict())
        else:
            ref_logps = all_logps(policy, tokenizer, found, max_length, args).tolist()
            found = [p | {"ref_logps": x} for p, x in zip(found, ref_logps, strict=True)]
        run.write_rows(f"pairs/{iteration}.jsonl", found)
        return found

    if run.step == 0:
        report()
    current = None
    for step in run.steps():
        start = time.time()
        # 1. Draw the pairs of this step; a new iteration has pairs and a reference of its own
        iteration, k = divmod(step - 1, steps_each)
        if k == 0 or not current:  # not: resumed
            current = new_pairs(iteration) if k == 0 else load_rows(
                run.folder / "pairs" / f"{iteration}.jsonl")
            order = [i for epoch in range(args.num_epochs) for i in random.Random(
                f"{args.seed} {iteration} {epoch}").sample(range(num_pairs), num_pairs)]
        drawn = [current[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
        batch, margins, gaps = (x.to(device) for x in collate(drawn, tokenizer, max_length))
        ref_logps = (all_logps(ref, tokenizer, drawn, max_length, args) if ref else
                     torch.tensor([pair["ref_logps"] for pair in drawn])).to(device)  # (N, 2)

        # 2. Log-probs and loss; each micro-batch weighs as much as its share of the step's pairs
        loss, nll, logps = 0.0, 0.0, torch.zeros_like(ref_logps)
        for mb in batch.split(args.micro_batch_size, whole_prompts=True):
            part, of = batch.rows(mb), batch.prompt_of[mb][::2]
            token_logps = completion_logps(policy, part, 1.0, args.share_prompts)
            mb_logps = sequence_logps(token_logps, part.completion_mask,
                                      args.normalize_length).view(-1, 2)
            four = *mb_logps.T, *ref_logps[of].T
            if args.loss == "dpo":
                mb_loss = dpo_loss(*four, args.beta, args.margin_scale * margins[of],
                                   args.label_smoothing)
            elif args.loss == "ipo":
                mb_loss = ipo_loss(*four, args.beta)
            elif args.loss == "rpo":
                mb_loss = rpo_loss(*four, args.beta, args.eta, gaps[of])
            else:
                mb_loss = rebel_loss(*four, args.eta, gaps[of])
            mb_nll = nll_loss(token_logps[::2], part.completion_mask[::2])
            mb_loss = (mb_loss + args.alpha * mb_nll) * len(of) / len(drawn)
            mb_loss.backward()
            loss += mb_loss.item()
            nll += mb_nll.item() * len(of) / len(drawn)
            logps[of] = mb_logps.detach()

        # 3. Gradient step
        lr = scheduler.get_last_lr()[0]
        grad_norm = update(optimizer, scheduler, loss, args.max_grad_norm)

        # 4. Log
        rewards = scale * (logps - ref_logps)  # implicit
        margin = rewards[:, 0] - rewards[:, 1]
        run.log({"loss": loss, "nll": nll, "margin": margin.mean(),
                 "accuracy": ((margin > 0).float() + (margin == 0) / 2).mean(),
                 "reward_chosen": rewards[:, 0].mean(), "reward_rejected": rewards[:, 1].mean(),
                 "logps_chosen": logps[:, 0].mean(), "logps_rejected": logps[:, 1].mean(),
                 "grad_norm": grad_norm, "lr": lr, "tokens_per_second":
                 batch.completion_mask.sum().item() / (time.time() - start)}, "loss", "accuracy")
        if step % args.eval_every == 0 or step == num_steps:
            report()
    run.finish(tokenizer, {"final": policy})

if __name__ == "__main__":
    main(parse_args(Args, TOY))
