"""What a transformer block is made of: one frozen description that every model family translates into."""

import dataclasses
from typing import Literal, get_args

from pallas_kernels import Activation

from .axes import Axes
from .routing import GateRule


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalisation: RMSNorm (arXiv:1910.07467) or LayerNorm with bias, and its place.

    `pre`: each sublayer's input is normed. `post`: each sublayer's output is, before it is added. `last` (DeepSpeed
    with `pre_layer_norm` false): attention reads the plain stream, the MLP a normed one, and the second sum is normed
    with the weights of the attention's norm.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6
    place: Literal["pre", "post", "last"] = "pre"

    def __post_init__(self):
        if self.kind not in ("rms", "layer") or self.place not in ("pre", "post", "last"):
            raise ValueError(f"norm: no kind {self.kind!r} at place {self.place!r}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon: {self.epsilon!r} is negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864): one angle per position and frequency.

    `frequencies`: radians per position, half as many as rotated components. `long_frequencies` and `long_factor`
    replace `frequencies` and `factor` for sequences longer than `switch_length` tokens (LongRoPE). `factor`
    multiplies cosine and sine. `interleaved`: pairs are neighbours `(2i, 2i+1)`, else halves `(i, i + dim/2)`.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False
    long_frequencies: tuple[float, ...] | None = None
    long_factor: float = 1.0
    switch_length: int | None = None

    @property
    def dim(self) -> int:
        """Rotated components of a head; the rest passes unrotated."""
        return 2 * len(self.frequencies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): ranks and the two parts of a query head."""

    query_rank: int | None
    rank: int
    plain_dim: int
    rotary_dim: int
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        _positive(self, "rank", "plain_dim", "rotary_dim")
        if self.query_rank is not None:
            _positive(self, "query_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self attention with grouped key/value heads.

    `scale` multiplies the scores. `causal`: queries see no later position. `alibi`: scores fall with distance, at a
    slope per head (arXiv:2108.12409). `qk_norm`: RMSNorm of queries and keys per head (`head`), over all heads together
    (`full`), or per head without weight on the layers with rotary positions (`l2`). `clip` bounds q, k and v.
    `sinks`: one learned logit per head that takes part in the softmax and is then left out (gpt-oss). A device's share
    of it (`moe_jax.sharding`) has fewer heads: those of all devices along mesh `axes` are `all_heads`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rope: RopeConfig | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full", "l2"] | None = None
    norm_epsilon: float = 1e-6
    norm_after_rope: bool = False
    clip: float | None = None
    sinks: bool = False
    latent: LatentConfig | None = None
    causal: bool = True
    alibi: bool = False
    axes: tuple[str, ...] = ()
    all_heads: int | None = None

    def __post_init__(self):
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "value_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads: {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope: rotates {self.rope.dim} components of a head of {self.head_dim}")
        if self.alibi and self.latent is not None:
            raise ValueError("alibi: not supported with latent attention")


Score = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The gate rule: how logits become chosen experts and weights (see `pallas_kernels.route`).

    `logit_bias`: a learned bias on the logits; `selection_bias`: one that only steers the choice. `scale_input`:
    the weight multiplies the expert's input, not its output (Llama 4). `rule`: DeepSpeed's gate in place of all
    other rules (`moe_jax.gating`); it may drop choices.
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    jitter: float = 0.01
    logit_bias: bool = False
    selection_bias: bool = False
    scale_input: bool = False
    rule: GateRule | None = None

    def __post_init__(self):
        _positive(self, "num_experts", "top_k", "groups", "top_groups")
        if self.score not in get_args(Score):
            raise ValueError(f"score: {self.score!r} is not one of {', '.join(get_args(Score))}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: {self.top_k} experts per token out of num_experts {self.num_experts}")
        if self.num_experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"groups: the best {self.top_groups} of {self.groups} groups of {self.num_experts} experts"
            )
        if self.top_groups * (self.num_experts // self.groups) < self.top_k:
            raise ValueError(f"top_k: {self.top_k} experts do not fit in {self.top_groups} groups")
        if self.score == "sparsemixer" and (self.top_k != 2 or self.groups != 1 or self.selection_bias):
            raise ValueError(f"top_k: {self.top_k}; sparsemixer chooses 2 experts, without bias or groups")
        others = self.score, self.groups, self.scale, self.selection_bias, self.scale_input
        if self.rule is not None and (self.rule.k, *others) != (self.top_k, "softmax", 1, 1.0, False, False):
            raise ValueError(
                f"rule: chooses {self.rule.k} experts of top_k {self.top_k}; takes no score, groups, scale, "
                f"selection_bias or scale_input, got {others}"
            )

    @property
    def drops(self) -> bool:
        """Whether choices beyond a capacity are dropped, so that each token's depend on all that run with it."""
        return self.rule is not None and self.rule.drop_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A gated or plain MLP: hidden width, activation, biases on all of its products."""

    hidden: int
    activation: Activation
    bias: bool = False

    def __post_init__(self):
        _positive(self, "hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One transformer block. `experts` with `router` make an MoE layer, `dense` a dense one; a model may have both.

    `shared`: an MLP beside the experts that every token takes; `shared_gate`: its output times a learned sigmoid;
    `mix`: experts and `shared` are weighed by a softmax over two learned coefficients (PR-MoE, arXiv:2201.05596), in
    this order of the two, with a bias if `mix_bias`. `residual_scale` multiplies each sublayer's output before it is
    added. `skip_attention` false: attention's output replaces the stream (DeepSpeed's literal data flow). `axes`: the
    mesh axes that a device's share is cut along, `exchange` how it meets other devices' experts (`moe_jax.exchange`).
    """

    width: int
    norm: NormConfig
    attention: AttentionConfig
    router: RouterConfig | None = None
    experts: MLPConfig | None = None
    shared: MLPConfig | None = None
    shared_gate: bool = False
    dense: MLPConfig | None = None
    residual_scale: float = 1.0
    mix: Literal["experts_first", "shared_first"] | None = None
    mix_bias: bool = False
    skip_attention: bool = True
    axes: Axes = Axes()
    exchange: str | None = None

    def __post_init__(self):
        _positive(self, "width")
        if self.mix not in (None, "experts_first", "shared_first"):
            raise ValueError(f"mix: {self.mix!r} is neither experts_first nor shared_first")
        if self.mix is not None and (self.shared is None or self.shared_gate):
            raise ValueError("mix: needs a shared MLP without a gate of its own")
        if (self.router is None) != (self.experts is None):
            raise ValueError("router and experts: one is given without the other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer while shapes stay equal, and which MLP the layer has.

    `window`: a query sees its own and the `window - 1` positions before it. `chunk`: it sees only positions of its
    own chunk. `rotary`: positions are rotated in. `temperature = (scale, floor)`: queries are multiplied by
    `1 + scale * log(1 + floor((position + 1) / floor))` (arXiv:2501.19399). `score_divisor` divides attention's
    scores. `num_experts`: where it is not the router's (pyramids, arXiv:2201.05596).
    """

    moe: bool
    window: int | None = None
    chunk: int | None = None
    rotary: bool = True
    temperature: tuple[float, float] | None = None
    score_divisor: float = 1.0
    num_experts: int | None = None

    def __post_init__(self):
        for name in ("window", "chunk", "num_experts"):
            if getattr(self, name) is not None:
                _positive(self, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A whole decoder: blocks of one shape, what differs per layer, and what stands before and behind them."""

    block: BlockConfig
    layers: tuple[LayerConfig, ...]
    vocab_size: int
    context: int
    tied: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    learned_positions: bool = False

    def __post_init__(self):
        _positive(self, "vocab_size", "context")
        if not self.layers:
            raise ValueError("layers: a model needs at least one layer")
        if any(layer.moe for layer in self.layers) and self.block.experts is None:
            raise ValueError("layers: there are MoE layers but no experts")
        if any(not layer.moe for layer in self.layers) and self.block.dense is None:
            raise ValueError("layers: there are dense layers but no dense MLP")
        if self.logit_divisor == 0:
            raise ValueError("logit_divisor: 0")
        for i, layer in enumerate(self.layers):
            if layer.num_experts is not None and not self._fits(layer):
                raise ValueError(f"layers: layer {i} with {layer.num_experts} experts does not fit the router")
        if self.moe_layers and max(self.expert_counts) != self.block.router.num_experts:
            raise ValueError(f"layers: {max(self.expert_counts)} experts at most, {self.block.router.num_experts} said")

    def _fits(self, layer: LayerConfig) -> bool:
        router = self.block.router
        plain = router is not None and router.groups == 1 and not router.logit_bias and not router.selection_bias
        return layer.moe and plain and router.top_k <= layer.num_experts <= router.num_experts

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.moe)

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """Experts of each MoE layer, in order."""
        layers = (self.layers[i] for i in self.moe_layers)
        return tuple(layer.num_experts or self.block.router.num_experts for layer in layers)

    @property
    def pyramid(self) -> bool:
        """Whether MoE layers differ in their number of experts, whose weights then lie in one flat stack."""
        return len(set(self.expert_counts)) > 1

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the dense layers, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.moe)
