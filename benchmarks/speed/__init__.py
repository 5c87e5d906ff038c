"""How fast ptacc is, beside a plain PyTorch loop and its peers, in one run: `python -m benchmarks.speed --help`.

A *contender* is a way to train: the plain loop, ptacc, or a peer. A *workload* is what all of them are to do. Each
contender runs in a process of its own, next to one of the plain loop; the two take turns, and every figure is a ratio
of neighbours. `docs/reference/speed.md` tells the method and the results.
"""
