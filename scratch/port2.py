"""Port benchmarks, toy/make.py; and hand edits of tests."""
import re,glob,subprocess
exec(open('/tmp/w16/scratch/port.py').read().split("for path in glob")[0].replace("folder=sys.argv[1]","folder=''"))
def fi(m):
    names=[x.strip() for x in re.sub(r'[()\n]|# noqa: E402',' ',m[2]).split(',') if x.strip()]
    a=[n for n in names if n in cm]; b=[n for n in names if n not in cm]
    noqa='  # noqa: E402' if 'E402' in m[0] else ''
    out=[]
    if a: out.append(f'{m[1]}from common import '+', '.join(a)+noqa)
    if b: out.append(f'{m[1]}from plumbing import '+', '.join(b)+noqa)
    return '\n'.join(out)
for path in glob.glob('benchmarks/*.py')+['toy/make.py']:
    s=open(path).read(); o=s
    s=re.sub(r'^( *)from common import (\((?:[^)]*)\)|[^\n(]*)$',fi,s,flags=re.M)
    s=s.replace('SystemExit','ValueError') if 'sides' in path else s
    if s!=o: open(path,'w').write(s); print(path)
