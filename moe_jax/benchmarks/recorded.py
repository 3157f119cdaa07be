"""Figures of other implementations that were measured elsewhere, in microseconds, to compare a run with.

All were measured on one NVIDIA H100 80GB HBM3 (700 W) on 2026-11-22: torch 2.11 + CUDA 13.0, triton 3.6, transformers
5.17, vLLM 0.33's Triton kernel (its best config), tokamax 0.0.17, jax 0.11.2; bf16, random data, medians of 20 runs or
more, dispatch left out (CUDA graphs; JAX: the lower of back-to-back calls and a scan), counted as `device_block`
counts. Nothing that drops tokens is listed.
"""

SOURCE = "recorded on one H100, 2026-11-22"
#: Fixed ceilings beside those of a run, for shares that compare from day to day: FLOP/s of bf16, bytes/s read.
FLOPS, READ = 700e12, 3.097e12
TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
VLLM = "vLLM fused_moe"

_NAMES = {
    "vllm": VLLM,
    "torch": "torch._grouped_mm, handwritten",
    "hf": "transformers grouped_mm",
    "compiled": "transformers grouped_mm + torch.compile",
    "tokamax": "tokamax ragged_dot mosaic (best of 4 configs)",
    "mgpu": "JAX in-tree Pallas mgpu ragged_dot (best of 2)",
    "ragged": "jax.lax.ragged_dot",
    "dense": "JAX dense all-experts einsum",
}
_TABLES = {
    "mixtral": """
        vllm      257   870   952   980  1751  5783  22200
        torch     354  1065  1152  1133  1839  5119  19000
        hf        381  1098  1191  1220  2283  6729  25900
        compiled    -   963     -     -     -  4971      -
        tokamax   370  1079  1137  1053  2770  8598  34000
        mgpu     1000   984   979  1071  2037  5950  21600
        ragged    951   971  1002  1095  7308 29500 121100
        dense     920   950   966  1069  4760     -      -""",
    "qwen3": """
        vllm       50   192   383   438   530   929   3040
        torch      99   267   498   554   667  1066   3068
        hf        129   296   535   616  1005  2396   8341
        compiled    -   245     -     -     -  1199      -
        tokamax    94   223   414   481   658  1440   4469
        mgpu      507   492   506   553   768  1423   4217
        ragged    454   529   711  1732 13400 59500      -
        dense     428   427   446   505     -     -      -""",
    "olmoe": """
        vllm       59   211   296   310   419  1047   3707
        torch     106   280   393   412   604  1102   3610
        hf        136   311   430   478   972  2525   9315
        tokamax    91   255   324   349   611  1566   5519
        mgpu      326   322   346   368   597  1309   4342
        ragged    317   362   478  1216  8665 36800      -
        dense     295   291   309   346     -     -      -""",
    "gptoss": """
        vllm       92   360   562   604   760  1889   6566
        torch     155   457   699   726   955  1828   6242
        hf        189   488   733   791  1283  3097  10800
        tokamax   151   469   641   613  1070  2901  10500
        mgpu      633   621   628   671   977  2134   7100
        ragged    575   621   656  1177  8759 33900 133900
        dense     576   579   599   643     -     -      -""",
    "dsv3ep": """
        vllm       53   246   609   939   993  1250   3111
        torch     105   325   742  1109  1154  1604   3128""",
}


def figures(model: str, tokens: int) -> dict[str, float]:
    """Microseconds by implementation for a short name and a number of tokens; empty where nothing was recorded.

    >>> figures("qwen3", 8)["vLLM fused_moe"], figures("qwen3", 9)
    (192.0, {})
    """
    if model not in _TABLES or tokens not in TOKENS:
        return {}
    column = 1 + TOKENS.index(tokens)
    lines = (line.split() for line in _TABLES[model].strip().splitlines())
    return {_NAMES[line[0]]: float(line[column]) for line in lines if line[column] != "-"}


def best(model: str, tokens: int) -> tuple[str, float] | None:
    """The fastest recorded implementation and its microseconds, None where nothing was recorded.

    >>> best("mixtral", 4096)
    ('transformers grouped_mm + torch.compile', 4971.0)
    """
    found = figures(model, tokens)
    return min(found.items(), key=lambda item: item[1]) if found else None
