import sys; sys.path.insert(0,'/work/main/tests')
import planted_bugs as pb
from pathlib import Path
new=Path('/tmp/w16')
tot=bad=0
for f in sorted(Path(sys.argv[1]).glob('*.txt')):
    for b in pb.read_bugs(f.read_text()):
        tot+=1
        try: pb.plant((new/b.file).read_text(), b)
        except Exception as e:
            bad+=1; print(f"{f.name} {b.file}:{b.scope} | {b.what} | {e}\n   - {b.old!r}\n   + {b.new!r}")
print(tot,bad)
