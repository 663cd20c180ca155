import hpl_nb.trainer as t
def fit(*a, experiment=None, **k):
    old = t.run_config
    def rc(*x): return old(*x) | ({"experiment": experiment} if experiment else {}) | {"format": 2}
    t.run_config = rc
    try: return t.fit(*a, **k)
    finally: t.run_config = old
