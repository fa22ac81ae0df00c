import re
def rep(s,a,b,n=1):
    assert s.count(a)==n,(s.count(a),a)
    return s.replace(a,b)
s=open('plumbing.py').read()
i=s.index('def load_policy_and_reference'); j=s.index('def check_finite(')
s=s[:i]+s[j:]
open('plumbing.py','w').write(s)
for f in ('grpo','reinforce_rloo','ppo'):
    g=open(f+'.py').read()
    g=rep(g,'''    policy, ref = load_policy_and_reference(args, device)
''','''    load_again = (AutoModelForCausalLM, args.model, device, args.dtype)
    policy = load_model(*load_again, args.gradient_checkpointing)
    ref = load_model(*load_again) if args.beta else None
''')
    if f!='ppo':
        g=rep(g,'from transformers import get_scheduler','from transformers import AutoModelForCausalLM, get_scheduler')
        g=rep(g,'    load_policy_and_reference,\n','    load_model,\n')
    else:
        g=rep(g,'    AutoModelForSequenceClassification,\n','    AutoModelForCausalLM,\n    AutoModelForSequenceClassification,\n')
        g=rep(g,'    load_policy_and_reference,\n','')
        g=rep(g,'''    warmup = args.critic_warmup
    optimizer, scheduler = make_optimizer(policy, args.learning_rate, args, after=warmup)
''','''    optimizer, scheduler = make_optimizer(policy, args.learning_rate, args, args.critic_warmup)
''')
        g=rep(g,'is_warmup = step <= warmup  #','is_warmup = step <= args.critic_warmup  #')
        g=rep(g,'''            fixed = (old_values, returns, weights)
            value_loss = add_value_gradients(critic, batch, index, *fixed, args)
''','''            value_loss = add_value_gradients(critic, batch, index, old_values, returns, weights, args)
''')
        g=rep(g,'"""-> AdamW for a model that is trained after so many steps, and its learning rate\'s schedule."""','"""-> AdamW for a model that learns after so many steps, and its learning rate\'s schedule."""')
        g=rep(g,'''        if ptx_losses:
            metrics["ptx_loss"] = sum(ptx_losses) / updates
''','''        metrics["ptx_loss"] = sum(ptx_losses) / updates if ptx_losses else math.nan  # left out
''')
        g=rep(g,'import random\nimport time','import math\nimport random\nimport time')
    open(f+'.py','w').write(g)
for f in ('sft','rm_bt','rm_kwise','prm','rejection_sampling'):
    g=open(f+'.py').read()
    print(f, re.findall(r'.*load_model\(.*',g))
