def rep(s,a,b,n=1):
    assert s.count(a)==n,(s.count(a),a)
    return s.replace(a,b)
p=open('ppo.py').read()
for k in ('value','policy','ptx'): p=p.replace(f'add_{k}_gradients',f'add_{k}_gradient')
p=rep(p,'        beta = controller.beta\n','')
p=rep(p,'token_rewards(scores, kl, mask, beta)\n        old_values','token_rewards(scores, kl, mask, controller.beta)\n        old_values')
p=rep(p,'''        if not is_warmup:
            controller.update(kl.sum(1).mean().item(), R)
''','')
p=rep(p,'''            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask), "beta": beta}
''','''            metrics |= {"kl": kl.sum(1).mean(), "kl_per_token": masked_mean(kl, mask)}
            metrics["beta"] = controller.beta
''')
p=rep(p,'''        if step % args.eval_every == 0 or step == args.num_steps:
            report()
''','''        if not is_warmup:
            controller.update(kl.sum(1).mean().item(), R)
        if step % args.eval_every == 0 or step == args.num_steps:
            report()
''')
open('ppo.py','w').write(p)
