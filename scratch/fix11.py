def rep(s,a,b,n=1):
    assert s.count(a)==n,(s.count(a),a)
    return s.replace(a,b)
p=open('ppo.py').read()
for k in ('value','policy','ptx'): p=p.replace(f'add_{k}_gradient',f'add_{k}_grad')
i=p.index('            value_loss = add_value_grad('); j=p.index('            grad_norm = torch.nn.utils.clip_grad_norm_(critic')
p=p[:i]+'''            value_loss = add_value_grad(critic, batch, index, old_values, returns, weights, args)
'''+p[j:]
p=rep(p,'''        for index in minibatches(R, args.num_epochs, args.num_minibatches):
            index = index.to(device)
''','''        for index in minibatches(R, args.num_epochs, args.num_minibatches, device):
''')
p=rep(p,'''def minibatches(num_completions, num_epochs, num_minibatches):
    """Yield the completions of each gradient step: long tensors of places.
''','''def minibatches(num_completions, num_epochs, num_minibatches, device="cpu"):
    """Yield the completions of each gradient step: long tensors of places, on `device`.
''')
p=rep(p,'yield from order.tensor_split(num_minibatches)','yield from order.to(device).tensor_split(num_minibatches)')
open('ppo.py','w').write(p)
g=open('grpo.py').read()
g=rep(g,'''        for index in minibatches(P, G, args.num_epochs, args.num_minibatches):
            index = index.to(device)
''','''        for index in minibatches(P, G, args.num_epochs, args.num_minibatches, device):
''')
g=rep(g,'''def minibatches(num_groups, num_generations, num_epochs, num_minibatches):
    """Yield the completions of each gradient step: long tensors of places, in whole groups.
''','''def minibatches(num_groups, num_generations, num_epochs, num_minibatches, device="cpu"):
    """Yield the completions of each gradient step: long tensors of places, in whole groups.
''')
g=rep(g,'''            yield (groups[:, None] * num_generations + torch.arange(num_generations)).flatten()
''','''            members = groups[:, None] * num_generations + torch.arange(num_generations)
            yield members.flatten().to(device)
''')
open('grpo.py','w').write(g)
s=open('plumbing.py').read()
s=rep(s,'''    how = getattr(config, "solution_score", "" if of_tokens else "last")
''','''    unknown = "" if of_tokens else "last"
    how = getattr(config, "solution_score", unknown)
''')
open('plumbing.py','w').write(s)
p=open('prm.py').read()
p=rep(p,'''    labels = {label for example in examples for label in example["labels"]}
''','''    labels = set()
    for example in examples:
        labels |= set(example["labels"])
''')
open('prm.py','w').write(p)
