def rep(s,a,b,n=1):
    assert s.count(a)==n,(s.count(a),a)
    return s.replace(a,b)
s=open('plumbing.py').read()
s=rep(s,'''def check_finite(''','''def load_policy_and_reference(args, device):
    """-> the policy to train, and the frozen model it begins as: None where --beta is 0."""
    auto_class = transformers.AutoModelForCausalLM
    policy = load_model(auto_class, args.model, device, args.dtype, args.gradient_checkpointing)
    if not args.beta:
        return policy, None
    return policy, load_model(auto_class, args.model, device, args.dtype)


def check_finite(''')
open('plumbing.py','w').write(s)
d=open('dpo_nll.py').read()
i=d.index('            if args.loss == "dpo":\n'); j=d.index('            mb_nll = nll_loss')
d=d[:i]+'''            margin = args.margin_scale * margins[pair]
            mb_loss = preference_loss(four, args, margin, gaps[pair])
'''+d[j:]
d=rep(d,'''def draw_pairs(''','''def preference_loss(four, args, margin, gap):
    """The preference term that --loss names: four log-probs, margin, gap (N,) -> scalar."""
    if args.loss == "dpo":
        return dpo_loss(*four, args.beta, margin, args.label_smoothing)
    if args.loss == "ipo":
        return ipo_loss(*four, args.beta)
    if args.loss == "rpo":
        return rpo_loss(*four, args.beta, args.eta, gap)
    return rebel_loss(*four, args.eta, gap)


def draw_pairs(''')
d=rep(d,'''    ref = None
    if not args.precompute_ref:
        ref = load_model(AutoModelForCausalLM, args.model, device, args.dtype)
''','''    load_again = (AutoModelForCausalLM, args.model, device, args.dtype)
    ref = None if args.precompute_ref else load_model(*load_again)
''')
d=rep(d,'''        start_model = load_model(AutoModelForCausalLM, args.model, device, args.dtype)
''','''        start_model = load_model(*load_again)
''')
open('dpo_nll.py','w').write(d)
p=open('ppo.py').read()
p=rep(p,'''    optimizer, scheduler = make_optimizer(
        args, policy, args.learning_rate, (args.num_steps - args.critic_warmup) * updates
    )
    critic_optimizer, critic_scheduler = make_optimizer(
        args, critic, args.critic_learning_rate, args.num_steps * updates
    )
''','''    rates = (args.learning_rate, args.critic_learning_rate)
    optimizer, scheduler = make_optimizer(policy, rates[0], args, after=args.critic_warmup)
    critic_optimizer, critic_scheduler = make_optimizer(critic, rates[1], args)
''')
i=p.index('def make_optimizer('); j=p.index('def add_value_gradients(')
p=p[:i]+'''def make_optimizer(model, learning_rate, args, after=0):
    """-> AdamW for a model that is trained after so many steps, and its learning rate's schedule."""
    adam = dict(eps=1e-5, weight_decay=0.0, fused=True)  # eps as in N+
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, **adam)
    num_updates = (args.num_steps - after) * args.num_epochs * args.num_minibatches
    return optimizer, get_scheduler(args.lr_schedule, optimizer, 0, max(1, num_updates))


'''+p[j:]
p=rep(p,'''    rates = (args.learning_rate, args.critic_learning_rate)
    optimizer, scheduler = make_optimizer(policy, rates[0], args, after=args.critic_warmup)
    critic_optimizer, critic_scheduler = make_optimizer(critic, rates[1], args)
''','''    warmup = args.critic_warmup
    optimizer, scheduler = make_optimizer(policy, args.learning_rate, args, after=warmup)
    critic_optimizer, critic_scheduler = make_optimizer(critic, args.critic_learning_rate, args)
''')
p=rep(p,'''        is_warmup = step <= args.critic_warmup  #''','''        is_warmup = step <= warmup  #''')
p=rep(p,'''            if is_warmup:
                continue

''','''            if is_warmup:
                continue
''')
p=rep(p,'''    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "critic": critic}
    parts |= {"critic_optimizer": critic_optimizer, "critic_scheduler": critic_scheduler}
    parts |= {"controller": controller}
''','''    parts = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler, "critic": critic}
    parts |= {"critic_optimizer": critic_optimizer, "critic_scheduler": critic_scheduler}
    parts["controller"] = controller
''')
open('ppo.py','w').write(p)
for f in ('grpo','reinforce_rloo','ppo'):
    g=open(f+'.py').read()
    g=rep(g,'''    recompute = args.gradient_checkpointing
    policy = load_model(AutoModelForCausalLM, args.model, device, args.dtype, recompute)
    ref = load_model(AutoModelForCausalLM, args.model, device, args.dtype) if args.beta else None
''','''    policy, ref = load_policy_and_reference(args, device)
''')
    if f!='ppo':
        g=rep(g,'from transformers import AutoModelForCausalLM, get_scheduler','from transformers import get_scheduler')
        g=rep(g,'    load_model,\n    load_prompts,','    load_policy_and_reference,\n    load_prompts,')
    else:
        g=rep(g,'    AutoModelForCausalLM,\n','')
        g=rep(g,'    load_model,\n    load_prompts,','    load_model,\n    load_policy_and_reference,\n    load_prompts,')
    open(f+'.py','w').write(g)
