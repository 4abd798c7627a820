# %% [markdown]
# # From GPT-2 to Llama 2 to Llama 3
#
# How does GPT-2 become Llama? With four changes: RMSNorm, rotary position embeddings, SwiGLU and
# grouped-query attention. Here they are made one at a time, with the effect and the cost of each. The final
# model is compared with tinyllm's Llama, and the sizes with the published ones. Nothing large is allocated;
# it runs in seconds.
#
# Read along with `tinyllm/models/gpt2.py` and then `tinyllm/models/llama.py`.

# %%
import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, Tensor, nn
from tinyllm import functional as F
from tinyllm.models.llama import GroupedQueryAttention
from tinyllm.models.rope import rope_frequencies

rng = np.random.default_rng(0)

# %% [markdown]
# ## One model for both
# A plan determines which changes are made. Without any, the model below is GPT-2.


# %%
@dataclass(frozen=True)
class Plan:
    vocabulary: int
    context: int
    layers: int
    channels: int
    heads: int
    inner: int  # width inside the MLP
    tied: bool = False  # one matrix for the embedding and the head
    rms_norm: bool = False  # change 1
    rope_theta: float | None = None  # change 2
    swiglu: bool = False  # change 3
    kv_heads: int | None = None  # change 4; None: one per query head
    biases: bool = True  # Llama has none


class Attention(nn.Module):
    def __init__(self, plan, rng):
        C, D = plan.channels, plan.channels // plan.heads
        G = plan.heads if plan.kv_heads is None else plan.kv_heads
        self.head_size = D
        self.q_proj = nn.Linear(C, C, plan.biases, rng=rng)
        self.k_proj = nn.Linear(C, G * D, plan.biases, rng=rng)
        self.v_proj = nn.Linear(C, G * D, plan.biases, rng=rng)
        self.o_proj = nn.Linear(C, C, plan.biases, rng=rng)

    def forward(self, x, rotation):  # (B, T, C)
        q, k, v = (
            projection(x).rearrange("b t (h d) -> b h t d", d=self.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = F.rope(q, *rotation), F.rope(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        return self.o_proj(y.rearrange("b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, plan, rng):
        self.gate_proj = nn.Linear(plan.channels, plan.inner, plan.biases, rng=rng) if plan.swiglu else None
        self.up_proj = nn.Linear(plan.channels, plan.inner, plan.biases, rng=rng)
        self.down_proj = nn.Linear(plan.inner, plan.channels, plan.biases, rng=rng)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.swiglu(self.gate_proj(x), self.up_proj(x)))


def norm(plan):
    return nn.RMSNorm(plan.channels, 1e-5) if plan.rms_norm else nn.LayerNorm(plan.channels, 1e-5)


class Block(nn.Module):
    def __init__(self, plan, rng):
        self.input_layernorm, self.self_attn = norm(plan), Attention(plan, rng)
        self.post_attention_layernorm, self.mlp = norm(plan), MLP(plan, rng)

    def forward(self, x, rotation):
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """With ``rng=None`` the weights are meta parameters, which take no memory, so any size can be counted."""

    def __init__(self, plan, rng=None):
        self.plan = plan
        self.embed_tokens = nn.Embedding(plan.vocabulary, plan.channels, rng=rng)
        learned = plan.rope_theta is None
        self.positions = nn.Embedding(plan.context, plan.channels, rng=rng) if learned else None
        self.layers = [Block(plan, rng) for _ in range(plan.layers)]
        self.norm = norm(plan)
        self.lm_head = nn.Linear(plan.channels, plan.vocabulary, bias=False, rng=rng)
        if plan.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):  # (B, T)
        x, rotation, places = self.embed_tokens(ids), None, np.arange(ids.shape[1])
        if self.positions is not None:
            x = x + self.positions(places)
        else:
            rotation = angles(places, self.plan.channels // self.plan.heads, self.plan.rope_theta)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.lm_head(self.norm(x))


def angles(places, head_size, theta):
    """cos and sin of position · θ^(-2i/D), (T, D/2) each."""
    turned = places[:, None] * theta ** (-np.arange(0, head_size, 2) / head_size)
    return np.cos(turned), np.sin(turned)


# %% [markdown]
# With GPT-2's sizes and no changes it has GPT-2's number of parameters.

# %%
gpt2_plan = Plan(50257, 1024, layers=12, channels=768, heads=12, inner=4 * 768, tied=True)
gpt2 = Model(gpt2_plan)
print(f"GPT-2: {gpt2.num_parameters():,} parameters")  # GPT-2: 124,439,808 parameters
assert gpt2.num_parameters() == GPT2(GPT2Config.preset("124M"), rng=None).num_parameters() == 124_439_808

# %% [markdown]
# ## 1. RMSNorm for LayerNorm
# LayerNorm subtracts the mean and divides by the standard deviation. RMSNorm only divides, by the root mean
# square: one pass fewer over the data, and no bias. Both remove the scale of the input, but RMSNorm does not
# remove the mean.

# %%
x = Tensor(3 + 2 * rng.standard_normal((1, 4096)))
for name, y in (("LayerNorm", F.layer_norm(x, (4096,))), ("RMSNorm", F.rms_norm(x, (4096,)))):
    root = math.sqrt((y.data**2).mean())
    print(f"{name:9}  mean {y.data.mean():6.3f}  root mean square {root:.3f}")
    assert abs(root - 1) < 1e-5
# LayerNorm  mean  0.000  root mean square 1.000
# RMSNorm    mean  0.830  root mean square 1.000

# %% [markdown]
# ## 2. Rotary position embeddings for learned ones
# GPT-2 adds a learned vector at every position. It has 1,024 of them, so there can be no 1,025th position.
# RoPE learns nothing: it rotates each pair of channels of queries and keys by an angle proportional to the
# position. With a query rotated by mω and a key by nω, their dot product contains only the angle (m - n)ω:
# the attention score depends on the distance, not on the positions. `tinyllm/models/rope.py` has the proof.

# %%
head_size = 64
q, k = (Tensor(rng.standard_normal((1, 1, 1, head_size))) for _ in range(2))


def score(m, n):
    """q · k with q at position m and k at position n."""
    rotated_q, rotated_k = (
        F.rope(t, *angles(np.array([at]), head_size, 10000.0)) for t, at in ((q, m), (k, n))
    )
    return (rotated_q * rotated_k).sum().item()


for distance in (0, 3, 100):
    scores = [score(n + distance, n) for n in (0, 7, 500, 4000)]
    print(f"distance {distance:3}: " + "  ".join(f"{s:.9f}" for s in scores))
    assert max(scores) - min(scores) < 1e-9
assert abs(score(0, 0) - (q * k).sum().item()) < 1e-12  # at distance 0 as without RoPE
assert abs(score(3, 0) - score(0, 3)) > 0.1  # but the sign of the distance matters

# %% [markdown]
# ## 3. SwiGLU for GELU
# GPT-2's MLP expands to 4 C channels, applies GELU and projects back: two matrices. SwiGLU has three: SiLU of
# a second expansion gates the first, channel by channel. For the same number of weights the inner width is
# 2/3 of 4 C, rounded up to a multiple of 256.

# %%
a, b = (Tensor(rng.standard_normal((2, 8))) for _ in range(2))
by_hand = a.data / (1 + np.exp(-a.data)) * b.data
assert np.abs(F.swiglu(a, b).data - by_hand).max() < 1e-15

C = 4096
inner = 256 * math.ceil(8 * C / 3 / 256)
print(f"Llama 2: inner width {inner:,}")  # Llama 2: inner width 11,008
print(f"two matrices {2 * C * 4 * C:,}, three {3 * C * inner:,}")
# two matrices 134,217,728, three 135,266,304
assert inner == LlamaConfig.preset("Llama-2-7B").intermediate_size

# %% [markdown]
# ## Llama 2
# GPT-2 enlarged to 32 layers of 4,096 channels and then changed step by step, with the number of parameters
# after each step. The last step removes the biases. (Llama 2 7B has as many key-value heads as query heads.)


# %%
def step(before, what, **changes):
    """Change the plan and print the effect on the number of parameters."""
    after = replace(before, **changes)
    count, previous = Model(after).num_parameters(), Model(before).num_parameters()
    print(f"{what:45}{count:>15,}{count - previous:>+16,}")
    return after


large = Plan(32000, 4096, layers=32, channels=4096, heads=32, inner=4 * 4096)
plan = step(large, "GPT-2, this large, with a head of its own")
plan = step(plan, "1. RMSNorm", rms_norm=True)
plan = step(plan, "2. rotary position embeddings", rope_theta=10000.0)
plan = step(plan, "3. SwiGLU, inner width 11,008", swiglu=True, inner=inner)
llama2 = step(plan, "no biases: Llama 2 7B", biases=False)
# GPT-2, this large, with a head of its own      6,723,084,288              +0
# 1. RMSNorm                                     6,722,818,048        -266,240
# 2. rotary position embeddings                  6,706,040,832     -16,777,216
# 3. SwiGLU, inner width 11,008                  6,739,775,488     +33,734,656
# no biases: Llama 2 7B                          6,738,415,616      -1,359,872
assert Model(llama2).num_parameters() == 6_738_415_616  # as published


def tinyllm_counts(size):
    return Llama(LlamaConfig.preset(size), rng=None).num_parameters()


assert Model(llama2).num_parameters() == tinyllm_counts("Llama-2-7B")

# %% [markdown]
# ## 4. Grouped-query attention
# Every head has its own queries, but several heads can share keys and values. With 8 key-value heads for 32
# query heads, two of the four matrices shrink to a quarter.

# %%
for name, kv_heads in (("MHA", 32), ("GQA", 8)):
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=kv_heads)
    weights = GroupedQueryAttention(config, rng=None).num_parameters()
    print(f"{name}, {kv_heads:2} key-value heads: {weights:,} weights")
    assert weights == {"MHA": 67_108_864, "GQA": 41_943_040}[name]
# MHA, 32 key-value heads: 67,108,864 weights
# GQA,  8 key-value heads: 41,943,040 weights

# %% [markdown]
# This equals ordinary attention in which each key and value head is repeated for every query head of its
# group. The repeated heads are never stored, neither in memory nor in the cache.

# %%
q = Tensor(rng.standard_normal((1, 8, 5, 16)))  # (B, H, T, D)
k, v = (Tensor(rng.standard_normal((1, 2, 5, 16))) for _ in range(2))  # (B, G, T, D)
shared = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
k_repeated, v_repeated = (Tensor(np.repeat(t.data, 4, axis=1)) for t in (k, v))  # (B, H, T, D)
repeated = F.scaled_dot_product_attention(q, k_repeated, v_repeated, is_causal=True)
print("largest difference:", np.abs(shared.data - repeated.data).max())  # 0.0, or nearly
assert np.abs(shared.data - repeated.data).max() < 1e-14

# %% [markdown]
# ## Llama 3
# Four times the vocabulary, grouped-query attention, and a wider MLP: 1.3 times Llama 2's width, rounded up
# to a multiple of 1,024. θ increases from 10,000 to 500,000, so the rotations are slower, for a longer
# context; that costs no parameters. Llama 3.2 1B is smaller, and its head is tied to the embedding again, as
# in GPT-2.

# %%
wider = 1024 * math.ceil(1.3 * int(8 * C / 3) / 1024)  # 14,336
plan = step(llama2, "Llama 2 7B")
plan = step(plan, "a vocabulary of 128,256", vocabulary=128256)
plan = step(plan, "4. 8 key-value heads", kv_heads=8)
llama3 = step(
    plan, f"inner width {wider:,}, theta 500,000: Llama 3 8B", inner=wider, rope_theta=5e5, context=8192
)
small = step(llama3, "16 layers, 2,048 channels, 8,192 inside", layers=16, channels=2048, inner=8192)
small = step(small, "tied embeddings: Llama 3.2 1B", tied=True, context=131072)
# Llama 2 7B                                     6,738,415,616              +0
# a vocabulary of 128,256                        7,526,944,768    +788,529,152
# 4. 8 key-value heads                           6,721,638,400    -805,306,368
# inner width 14,336, theta 500,000: Llama 3 8B  8,030,261,248  +1,308,622,848
# 16 layers, 2,048 channels, 8,192 inside        1,498,482,688  -6,531,778,560
# tied embeddings: Llama 3.2 1B                  1,235,814,400    -262,668,288
assert Model(llama3).num_parameters() == tinyllm_counts("Llama-3-8B") == 8_030_261_248
assert Model(small).num_parameters() == tinyllm_counts("Llama-3.2-1B") == 1_235_814_400

# %% [markdown]
# ## The cost of the cache
# Decoding caches the keys and values of all positions: 2 · layers · key-value heads · head size numbers per
# token. Grouped-query attention reduces this: with as many layers and channels, Llama 3 needs a quarter of
# Llama 2's memory. In float32 (half precision needs half of it), per token and for the whole context:


# %%
def cache_bytes(plan, itemsize):
    """The size of one token's keys and values in all layers."""
    kv_heads = plan.heads if plan.kv_heads is None else plan.kv_heads
    return 2 * plan.layers * kv_heads * (plan.channels // plan.heads) * itemsize


sizes = {"GPT-2 124M": gpt2_plan, "Llama 2 7B": llama2, "Llama 3 8B": llama3, "Llama 3.2 1B": small}
for name, each in sizes.items():
    per_token = cache_bytes(each, itemsize=4)
    whole = each.context * per_token / 2**30
    print(f"{name:12}  {per_token / 1024:5.0f} KiB per token  {whole:5.2f} GiB for {each.context:7,} tokens")
# GPT-2 124M       72 KiB per token   0.07 GiB for   1,024 tokens
# Llama 2 7B     1024 KiB per token   4.00 GiB for   4,096 tokens
# Llama 3 8B      256 KiB per token   2.00 GiB for   8,192 tokens
# Llama 3.2 1B     64 KiB per token   8.00 GiB for 131,072 tokens
assert cache_bytes(llama2, 4) == 4 * cache_bytes(llama3, 4)

cache = Llama(LlamaConfig.preset("Llama-3.2-1B"), rng=None).new_cache(batch=1, capacity=10)
assert sum(array.nbytes for array in cache.keys + cache.values) == 10 * cache_bytes(small, 4)  # allocated

# %% [markdown]
# ## Is it Llama?
# A small model with all changes, and tinyllm's Llama with the same weights, in float64. The names of the
# parameters equal the checkpoint's, so `load_state_dict` copies them all.

# %%
toy = replace(
    llama3, vocabulary=100, context=64, layers=2, channels=32, heads=4, kv_heads=2, inner=48, rope_theta=1e4
)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
)
llama = Llama(config, rng=rng).astype(np.float64).eval()
mine = Model(toy, rng).astype(np.float64)
mine.load_state_dict(llama.state_dict())
ids = rng.integers(0, 100, (2, 64))
difference = np.abs(mine(ids).data - llama(ids).data).max()
print(f"largest difference of {mine(ids).size:,} logits: {difference:.0e}")
assert difference < 1e-12

# %% [markdown]
# ## The longer context of Llama 3.1
# Llama 3 was trained on sequences of 8,192 tokens; Llama 3.1 extends the context to 131,072. Pairs of
# channels that rotate more than 4 times within 8,192 tokens resolve small distances and are unchanged. Pairs
# that do not complete one rotation would reach angles never seen in training. They are slowed down 8 times,
# so that 65,536 tokens rotate them as far as 8,192 did. In between, the factor is interpolated. (Training on
# long texts did the rest.)

# %%
before = rope_frequencies(LlamaConfig.preset("Llama-3-8B"))  # radians per position, one for each pair
after = rope_frequencies(LlamaConfig.preset("Llama-3.1-8B"))
turns = 8192 * before / (2 * math.pi)  # in the context it was trained on
print("pair  tokens per turn  turns in 8,192  slowed down")
for i in range(0, len(before), 7):
    print(f"{i:4}  {2 * math.pi / before[i]:15,.0f}  {turns[i]:14.2f}  {before[i] / after[i]:10.2f} times")
# pair  tokens per turn  turns in 8,192  slowed down
#    0                6         1303.80        1.00 times
# …
#   28            1,956            4.19        1.00 times
#   35            8,219            1.00        8.00 times
# …
#   63        2,559,196            0.00        8.00 times
slower = before / after
assert (slower[turns > 4] == 1).all() and np.allclose(slower[turns < 1], 8, rtol=1e-15)
slope = slower[(turns > 1) & (turns < 4)]
print("between them:", slope.round(2))
assert len(slope) and (np.diff(slope) > 0).all() and slope.min() > 1 and slope.max() < 8

# %%
if importlib.util.find_spec("matplotlib"):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(2 * math.pi / before, slower, "o-", markersize=3)
    axes.axvspan(8192 / 4, 8192, alpha=0.2, label="1 to 4 turns in 8,192 tokens")
    axes.set(xlabel="tokens per turn", ylabel="slowed down (times)", title="RoPE in Llama 3.1 (factor 8)")
    axes.legend()
    picture = Path("runs") / "rope-scaling.png"
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture)
    print("picture:", picture)
