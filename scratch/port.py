"""Port a folder of tests to the new layout."""
import re,sys,glob
folder=sys.argv[1]
import ast
def names_of(path):
    out=set()
    for n in ast.parse(open(path).read()).body:
        if isinstance(n,(ast.FunctionDef,ast.ClassDef)): out.add(n.name)
        if isinstance(n,ast.Assign): out|={t.id for t in n.targets if isinstance(t,ast.Name)}
    return out
pl=names_of('/tmp/w16/plumbing.py'); cm=names_of('/tmp/w16/common.py')
scripts='grpo ppo reinforce_rloo dpo_nll rejection_sampling rm_bt rm_kwise prm sft'.split()
imported={}
for s in scripts:
    tree=ast.parse(open(f'/tmp/w16/{s}.py').read())
    imported[s]={a.asname or a.name for n in tree.body if isinstance(n,(ast.ImportFrom,ast.Import)) for a in n.names}|names_of(f'/tmp/w16/{s}.py')
for path in glob.glob(folder+'/*.py'):
    s=open(path).read(); o=s
    if path.endswith(('planted_bugs.py','test_plain_ppo_x')): continue
    # names through common
    s=re.sub(r'\bcommon\.(\w+)',lambda m: ('plumbing.' if m[1] in pl and m[1] not in cm else 'common.')+m[1] if m[1]!='py' else m[0],s)
    s=s.replace('common.transformers','transformers')
    # names through scripts that no longer import them
    alias={}
    for m in re.finditer(r'^import (\w+) as (\w+)$',s,re.M):
        if m[1] in scripts: alias[m[2]]=m[1]
    for k in list(alias)+scripts:
        real=alias.get(k,k)
        def f(m):
            n=m[1]
            if n in imported[real] or n not in pl|cm: return m[0]
            return ('common.' if n in cm else 'plumbing.')+n
        s=re.sub(r'(?<![\w./"])'+k+r'\.(\w+)',f,s)
    # from common import ...
    def fi(m):
        names=[x.strip() for x in re.sub(r'[()\n]',' ',m[2]).split(',') if x.strip()]
        a=[n for n in names if n in cm]; b=[n for n in names if n not in cm]
        out=[]
        if a: out.append(f'{m[1]}from common import '+', '.join(a))
        if b: out.append(f'{m[1]}from plumbing import '+', '.join(b))
        return '\n'.join(out)
    s=re.sub(r'^( *)from common import (\([^)]*\)|[^\n(]*)$',fi,s,flags=re.M)
    if re.search(r'\bplumbing\.',s) and not re.search(r'^import plumbing|^    import plumbing',s,re.M):
        if re.search(r'^import common',s,re.M): s=re.sub(r'^import common.*$',lambda m:m[0]+'\nimport plumbing',s,count=1,flags=re.M)
        else: s=re.sub(r'^(import \w+)',lambda m:m[0]+'\nimport plumbing',s,count=1,flags=re.M)
    if re.search(r'\bcommon\.',s) and not re.search(r'^import common',s,re.M) and 'import common' not in s:
        s=re.sub(r'^import plumbing',lambda m:'import common\nimport plumbing',s,count=1,flags=re.M)
    s=s.replace('SystemExit','ValueError')
    s=s.replace('"update"','"check_finite"')
    for k in list(alias)+scripts: s=s.replace(k+'.update\n',k+'.check_finite\n').replace(k+'.update,',k+'.check_finite,').replace('"'+k+'.update','"'+k+'.check_finite')
    s=re.sub(r'setattr\(plumbing.Run, "_plot", lambda self: None(, raising=False)?\)','setattr(plumbing, "draw_curves", lambda rows, path: None)',s)
    if 'test_plumbing' not in path: s=s.replace('stopped.value.code','str(stopped.value)')
    if s!=o: open(path,'w').write(s); print('ported',path)
