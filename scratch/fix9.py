def rep(s,a,b,n=1):
    assert s.count(a)==n,(s.count(a),a)
    return s.replace(a,b)
c=open('common.py').read()
c=rep(c,'''    options["cache" if "cache" in known else "past_key_values"] = cache
''','''    cache_name = "cache" if "cache" in known else "past_key_values"
    options[cache_name] = cache
''')
c=rep(c,'''    order = torch.tensor([i for prompts in passes for i in prompts], device=ids.device)
    place = order.argsort()[batch.prompt_of]  # argsort of a permutation is its inverse
''','''    order = torch.tensor(sum(passes, start=[]), device=ids.device)
    place = order.argsort()[batch.prompt_of]  # argsort of a permutation is its inverse
''')
c=rep(c,'''    # 1. Plan: prompts of like length share a pass. In one pass of all, most would be padding.
    passes = []
    for i in sorted(range(len(ids)), key=lambda i: -lengths[i]):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
''','''    # 1. Plan: prompts of like length share a pass. In one pass of all, most would be padding.
    passes = _plan_passes(lengths)
''')
c=rep(c,'sum(passes, start=[])','_concatenate(passes)')
c=rep(c,'''def _join(parts):''','''def _plan_passes(lengths):
    """Lengths of prompts -> lists of prompts, the longest first, that share a forward pass."""
    passes = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS_TOKENS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes


def _join(parts):''')
c=rep(c,'_concatenate(passes)','[i for prompts in passes for i in prompts]')
c=rep(c,'''    order = torch.tensor([i for prompts in passes for i in prompts], device=ids.device)
''','''    order = torch.cat([torch.tensor(prompts, device=ids.device) for prompts in passes])
''')
# generate
c=rep(c,'''        cache, logits = _prompt_cache(model, model, batch, mask.shape[1])
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[i] = _RoomyLayer(layer)
        if logits''','''        cache, logits = _prompt_cache(model, model, batch, mask.shape[1])
        _make_roomy(cache)
        if logits''')
c=rep(c,'''def _sample(logits''','''def _make_roomy(cache):
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = _RoomyLayer(layer)


def _sample(logits''')
i=c.index('    batch = batch.rows(torch.arange(len(ids), device=model.device))\n'); j=c.index('# --- KL and means')
c=c[:i]+'''    batch = batch.rows(torch.arange(len(ids), device=model.device))  # cut to the longest
    return batch, _decode(tokenizer, batch), ended


def _decode(tokenizer, batch):
    """Texts of the completions of a batch, without special tokens."""
    completions = []
    for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True):
        completions.append(ids[mask].tolist())
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


'''+c[j:]
c=rep(c,'''def generate(
    model,
    tokenizer,
    prompts,
    num_generations,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
):''','''def generate(
    model, tokenizer, prompts, num_generations, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0
):''')
open('common.py','w').write(c)
s=open('plumbing.py').read()
s=rep(s,'''        for names in columns:
            _check_column(row, (names,) if isinstance(names, str) else names, where)
''','''        for names in columns:
            _check_column(row, names, where)
''')
s=rep(s,'''    """Stop where a row has none of these columns, or an empty one."""
''','''    """Stop where a row has none of these columns, or an empty one. A text names one column."""
    if isinstance(names, str):
        names = (names,)
''')
s=rep(s,'''    names = {name for row in rows for name in row} - {"step", "seconds"}
''','''    names = set()
    for row in rows:
        names |= set(row)
    names -= {"step", "seconds"}
''')
i=s.index('    @torch.no_grad()\n    def function('); j=s.index('def _close_of(')
s=s[:i]+'''    @torch.no_grad()
    def function(prompts, completions, rows):
        # From the texts, as the reward model may have another tokenizer and template
        encoded = []
        for prompt, text, row in zip(prompts, completions, rows, strict=True):
            steps = [text]
            if separator:
                steps = [step for step in text.split(separator) if step.strip()]
            ending = close if row.get("ended", True) else []
            encoded.append(encode_steps(tokenizer, prompt, steps, separator, ending))
        values = []
        for logits in _step_logits(model, encoded, micro_batch_size):
            probs = positive_probs(logits) if of_tokens else logits[:, 0]
            everywhere = torch.ones(1, len(probs), dtype=torch.bool)
            if by_step:
                values.append(probs.tolist())
            else:
                values.append(solution_score(probs[None], everywhere, how).item())
        return values

    return function


def _step_logits(model, encoded, micro_batch_size):
    """Outputs of the head at the step ends of each completion -> list of R tensors (S, labels).

    encoded: prompt ids, ids and step ends of each, from `encode_steps`.
    """
    outputs = [None] * len(encoded)
    lengths = torch.tensor([len(ids) for _, ids, _ in encoded])
    # By length, so that little is padding (book 10.2.4.1); the outputs keep their places
    for index in lengths.argsort().split(micro_batch_size):
        part = [encoded[i] for i in index]
        prompts = pad([prompt_ids for prompt_ids, _, _ in part], "left")
        completions = pad([ids for _, ids, _ in part], "right")
        batch = Batch(*prompts, *completions, torch.arange(len(part)))
        logits = completion_scores(model, batch.to(model.device)).cpu()
        for i, row, (_, _, ends) in zip(index.tolist(), logits, part, strict=True):
            outputs[i] = row[ends]
    return outputs


'''+s[j:]
s=rep(s,'''        stop(
            f"--reward-model {path}: its config.json does not say how to read the steps: make it "
            f"with {made_with}"
        )
''','''        stop(f"--reward-model {path}: its config.json has no step_separator: make it with {made_with}")
''') if False else s
open('plumbing.py','w').write(s)
p=open('prm.py').read()
p=rep(p,'''        if isinstance(label, bool):
            labels.append(1 if label else -1)
        else:
            labels.append(label)
''','''        if label is True:
            labels.append(1)
        elif label is False:
            labels.append(-1)
        else:
            labels.append(label)
''')
p=rep(p,'''                texts, labels = [row["completion"]], [row["label"]]
''','''                texts = [row["completion"]]
                labels = [row["label"]]
''')
p=rep(p,'''        labels = [-100 if label is None else int(label) for label in example["labels"]]
        labels += [-100] * (len(example["texts"]) - len(labels))
''','''        labels = [-100] * len(example["texts"])
        for i, label in enumerate(example["labels"]):
            if label is not None:
                labels[i] = int(label)
''')
open('prm.py','w').write(p)
r=open('rejection_sampling.py').read()
r=rep(r,'''    ended = [done for group in groups for done in group["ended"]]
''','''    ended = []
    for group in groups:
        ended += group["ended"]
''')
r=rep(r,'''    run.finish(tokenizer, {"final": policy} if args.train else {})
''','''    run.finish(tokenizer, {"final": policy} if args.train else {})
'''.replace('{"final": policy} if args.train else {}','saved')) 
r=rep(r,'''    run.finish(tokenizer, saved)
''','''    saved = {"final": policy} if args.train else {}
    run.finish(tokenizer, saved)
''')
open('rejection_sampling.py','w').write(r)
for f in ('rm_bt','rm_kwise'):
    g=open(f+'.py').read()
    g=rep(g,'''    ranks = [rank for example in examples for rank in example["ranks"]]
''','''    ranks = []
    for example in examples:
        ranks += example["ranks"]
''')
    open(f+'.py','w').write(g)
g=open('grpo.py').read()
g=rep(g,'''        losses, grad_norms, num_clipped, sum_approx_kl = [], [], 0, 0.0
''','''        losses, grad_norms = [], []
        num_clipped, sum_approx_kl = 0, 0.0
''')
open('grpo.py','w').write(g)
p=open('ppo.py').read()
p=rep(p,'''                seed = f"{args.seed} {step} {len(losses)}"
                ptx_losses.append(add_ptx_gradients(policy, tokenizer, pretrain_texts, args, seed))
''','''                ptx_seed = f"{args.seed} {step} {len(losses)}"
                ptx = add_ptx_gradients(policy, tokenizer, pretrain_texts, args, ptx_seed)
                ptx_losses.append(ptx)
''')
i=p.index('        metrics = {\n'); 
p=rep(p,'''            value_loss = add_value_gradients(critic, batch, index, old_values, returns, weights, args)
            grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            check_finite(value_loss, grad_norm.item())
            critic_optimizer.step()
            critic_scheduler.step()
            critic_optimizer.zero_grad()
            value_losses.append(value_loss)
''','''            value_loss = add_value_gradients(critic, batch, index, old_values, returns, weights, args)
            value_losses.append(value_loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            check_finite(value_loss, grad_norm.item())
            critic_optimizer.step()
            critic_scheduler.step()
            critic_optimizer.zero_grad()
''')
open('ppo.py','w').write(p)
