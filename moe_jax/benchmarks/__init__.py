"""Benchmarks behind `moe-jax bench`: each checks its results, then times them against a named baseline.

`block` (the MoE block, and its cost as experts are added), `decode` (greedy generation), `load` (time and memory of
loading) on a CPU; `timing` and `table` are what they share, `torch_baseline` is what they compare with.

For whole models by name: `model_run` measures `models` by `device_model`, which counts by `work`. `profile` shows
where their time goes: `kernels` of a trace, sorted into `stages` by the compiled program, which `hlo` reads.

For models' shapes and on accelerators: `accelerator` runs `device_block` (the block as `shapes` and `inputs` define it,
timed by `programs`, checked by `numerics`) and `device_routing`, against `jax_baselines`, `torch_block` and what is
`recorded`, and `grid` prints it.
"""
