"""Benchmarks behind `moe-jax bench`: each checks its results, then times them against a named baseline.

`block` (the MoE block, and its cost as experts are added), `decode` (greedy generation), `load` (time and memory of
loading); `timing` and `table` are what they share, `torch_baseline` is the only place that imports torch.
"""
