import ast,glob
for path in sorted(glob.glob('*.py')):
    tree=ast.parse(open(path).read())
    def depth(node,d=0):
        best=d
        for c in ast.iter_child_nodes(node):
            inc=isinstance(c,(ast.For,ast.While,ast.If,ast.With,ast.Try))
            if isinstance(node,ast.If) and isinstance(c,ast.If) and c in node.orelse and len(node.orelse)==1: inc=False
            if isinstance(c,(ast.FunctionDef,ast.Lambda)): continue
            best=max(best,depth(c,d+inc))
        return best
    for n in ast.walk(tree):
        if isinstance(n,(ast.ListComp,ast.SetComp,ast.DictComp,ast.GeneratorExp)):
            if len(n.generators)>1: print(path,n.lineno,'nested comp')
            if any(len(g.ifs)>1 for g in n.generators): print(path,n.lineno,'two ifs')
            if any(isinstance(x,ast.IfExp) for x in ast.walk(n)): print(path,n.lineno,'cond in comp')
        if isinstance(n,ast.NamedExpr): print(path,n.lineno,'walrus')
        if isinstance(n,ast.FunctionDef):
            l=n.end_lineno-n.lineno+1
            if n.name!='main' and l>45: print(path,n.lineno,n.name,l)
            if n.name=='main': print(path,'main',l,'depth',depth(n))
        if isinstance(n,(ast.Call,)):
            for a in list(n.args)+[k.value for k in n.keywords]:
                if isinstance(a,ast.IfExp): print(path,n.lineno,'cond in arg')
            if getattr(n.func,'id','')=='zip' and any(isinstance(a,ast.Starred) for a in n.args): print(path,n.lineno,'zip*')
        if isinstance(n,ast.Subscript) and any(isinstance(x,ast.IfExp) for x in ast.walk(n.slice)): print(path,n.lineno,'cond in subscript')
        if isinstance(n,ast.Assign) and isinstance(n.targets[0],ast.Tuple) and isinstance(n.value,ast.Tuple): print(path,n.lineno,'tuple assign',ast.unparse(n)[:70])
