"""Compare the speed of ptacc, a plain PyTorch loop and other trainers: `python -m benchmarks.speed --help`.

A *contender* is the plain loop, ptacc or another trainer. A *workload* is the work that each contender runs. Each
contender runs in its own process, next to a process of the plain loop. The two take turns, and each ratio compares two
consecutive turns. `docs/reference/speed.md` describes the method and the results.
"""
