import json,sys
def load(p): 
    return [{k:v for k,v in json.loads(l).items() if k not in("seconds","tokens_per_second")} for l in open(p)]
a,b=load('/tmp/w16/runs/a/metrics.jsonl'),load('/tmp/w16/runs/b/metrics.jsonl')
bad=0
if len(a)!=len(b): print("LEN",len(a),len(b)); sys.exit(1)
for x,y in zip(a,b):
    for k in sorted(set(x)|set(y)):
        if x.get(k)!=y.get(k):
            bad+=1
            if bad<6: print(" ",x.get('step'),k,x.get(k),y.get(k))
sys.exit(bool(bad))
