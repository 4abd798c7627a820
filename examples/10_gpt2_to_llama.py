# %% [markdown]
# # From GPT-2 to Llama, to Qwen3, to Gemma 3
#
# How does GPT-2 become Llama? With four changes: RMSNorm, rotary position embeddings, SwiGLU and
# grouped-query attention. One more makes it Qwen3, and six more Gemma 3. After this chapter you can say what
# each of them does and costs: they are made one at a time, the final models are compared with tinyllm's, and
# the sizes with the published ones. Nothing large is allocated. 15 minutes; prerequisites: 05 attention and
# 06 GPT-2.
#
# Read along: `tinyllm/models/gpt2.py`, then `llama.py`, `qwen.py`, `gemma2.py` and `gemma3.py` beside it.
# Exercises: `examples/exercises/06_rms_norm.py`, `08_swiglu.py`, `11_grouped_query_attention.py`,
# `12_rope.py`.

# %%
import math
from dataclasses import dataclass, replace

import numpy as np

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, Tensor, nn
from tinyllm import functional as F
from tinyllm.models import Gemma3, Gemma3Config
from tinyllm.tools.plot import new_figure, show

rng = np.random.default_rng(0)

# %% [markdown]
# ## One model for all
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
    # Llama
    norm: type = nn.LayerNorm  # change 1
    eps: float = 1e-5
    rope_theta: float | None = None  # change 2
    gate: str | None = None  # change 3: "silu"
    kv_heads: int | None = None  # change 4; None: one per query head
    biases: bool = True  # Llama has none
    # Qwen3
    qk_norm: bool = False  # change 5
    head_size: int | None = None  # None: channels / heads
    # Gemma 3
    norms_after: bool = False  # change 7
    window: int | None = None  # change 9: of five layers of six
    local_theta: float | None = None  # change 10: theta in those
    scale: float = 1.0  # change 11: of the embeddings

    @property
    def each_head(self):
        return self.head_size or self.channels // self.heads

    def window_of(self, layer):
        return self.window if (layer + 1) % 6 else None


class Attention(nn.Module):
    def __init__(self, plan, window, rng):
        C, D = plan.channels, plan.each_head
        G = plan.heads if plan.kv_heads is None else plan.kv_heads
        self.head_size, self.window = D, window
        self.q_proj = nn.Linear(C, plan.heads * D, plan.biases, rng=rng)
        self.k_proj = nn.Linear(C, G * D, plan.biases, rng=rng)
        self.v_proj = nn.Linear(C, G * D, plan.biases, rng=rng)
        self.o_proj = nn.Linear(plan.heads * D, C, plan.biases, rng=rng)
        self.q_norm = plan.norm(D, plan.eps) if plan.qk_norm else None
        self.k_norm = plan.norm(D, plan.eps) if plan.qk_norm else None

    def forward(self, x, rotation):  # (B, T, C)
        q, k, v = (
            projection(x).rearrange("b t (h d) -> b h t d", d=self.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = F.rope(q, *rotation), F.rope(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, window=self.window)
        return self.o_proj(y.rearrange("b h t d -> b t (h d)"))  # y is (B, H, T, D)


class MLP(nn.Module):
    def __init__(self, plan, rng):
        self.gate_proj = nn.Linear(plan.channels, plan.inner, plan.biases, rng=rng) if plan.gate else None
        self.up_proj = nn.Linear(plan.channels, plan.inner, plan.biases, rng=rng)
        self.down_proj = nn.Linear(plan.inner, plan.channels, plan.biases, rng=rng)
        self.gated = F.geglu if plan.gate == "gelu" else F.swiglu

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, plan, layer, rng):
        names = ["input_layernorm", "post_attention_layernorm"]
        if plan.norms_after:  # then the second is what its name says, and these are around the MLP
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            setattr(self, name, plan.norm(plan.channels, plan.eps))
        self.self_attn, self.mlp = Attention(plan, plan.window_of(layer), rng), MLP(plan, rng)
        self.norms_after = plan.norms_after

    def forward(self, x, rotation):
        if self.norms_after:
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """With ``rng=None`` the weights are meta parameters, which take no memory, so any size can be counted."""

    def __init__(self, plan, rng=None):
        self.plan = plan
        self.embed_tokens = nn.Embedding(plan.vocabulary, plan.channels, rng=rng)
        learned = plan.rope_theta is None
        self.positions = nn.Embedding(plan.context, plan.channels, rng=rng) if learned else None
        self.layers = [Block(plan, layer, rng) for layer in range(plan.layers)]
        self.norm = plan.norm(plan.channels, plan.eps)
        self.lm_head = nn.Linear(plan.channels, plan.vocabulary, bias=False, rng=rng)
        if plan.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):  # (B, T)
        plan, places = self.plan, np.arange(ids.shape[1])
        x = self.embed_tokens(ids) * plan.scale
        if self.positions is not None:
            x = x + self.positions(places)
        for layer in self.layers:
            local = plan.local_theta if layer.self_attn.window else None
            theta = local or plan.rope_theta
            x = layer(x, None if theta is None else angles(places, plan.each_head, theta))
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
print(f"GPT-2: {gpt2.num_parameters():,} parameters")
# > GPT-2: 124,439,808 parameters
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
    print(f"{name:9}  mean {y.data.mean():z6.3f}  root mean square {root:.3f}")
    assert abs(root - 1) < 1e-5
# > LayerNorm  mean  0.000  root mean square 1.000
# > RMSNorm    mean  0.830  root mean square 1.000

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
# > distance   0: -8.759594941  -8.759594941  -8.759594941  -8.759594941
# > distance   3: -8.303339757  -8.303339757  -8.303339757  -8.303339757
# > distance 100: -8.003943219  -8.003943219  -8.003943219  -8.003943219

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
print(f"Llama 2: inner width {inner:,}")
# > Llama 2: inner width 11,008
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
plan = step(plan, "1. RMSNorm", norm=nn.RMSNorm)
plan = step(plan, "2. rotary position embeddings", rope_theta=10000.0)
plan = step(plan, "3. SwiGLU, inner width 11,008", gate="silu", inner=inner)
llama2 = step(plan, "no biases: Llama 2 7B", biases=False)
# > GPT-2, this large, with a head of its own      6,723,084,288              +0
# > 1. RMSNorm                                     6,722,818,048        -266,240
# > 2. rotary position embeddings                  6,706,040,832     -16,777,216
# > 3. SwiGLU, inner width 11,008                  6,739,775,488     +33,734,656
# > no biases: Llama 2 7B                          6,738,415,616      -1,359,872
assert Model(llama2).num_parameters() == 6_738_415_616  # as published

# %% [markdown]
# ## 4. Grouped-query attention
# Every head has its own queries, but several heads can share keys and values. With 8 key-value heads for 32
# query heads, two of the four matrices shrink to a quarter.
#
# This equals ordinary attention in which each key and value head is repeated for every query head of its
# group. The repeated heads are never stored, neither in memory nor in the cache.

# %%
q = Tensor(rng.standard_normal((1, 8, 5, 16)))  # (B, H, T, D)
k, v = (Tensor(rng.standard_normal((1, 2, 5, 16))) for _ in range(2))  # (B, G, T, D)
shared = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
k_repeated, v_repeated = (Tensor(np.repeat(t.data, 4, axis=1)) for t in (k, v))  # (B, H, T, D)
repeated = F.scaled_dot_product_attention(q, k_repeated, v_repeated, is_causal=True)
difference = np.abs(shared.data - repeated.data).max()
print("the same, but for rounding:", difference < 1e-14)
assert difference < 1e-14
# > the same, but for rounding: True

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
# > Llama 2 7B                                     6,738,415,616              +0
# > a vocabulary of 128,256                        7,526,944,768    +788,529,152
# > 4. 8 key-value heads                           6,721,638,400    -805,306,368
# > inner width 14,336, theta 500,000: Llama 3 8B  8,030,261,248  +1,308,622,848
# > 16 layers, 2,048 channels, 8,192 inside        1,498,482,688  -6,531,778,560
# > tied embeddings: Llama 3.2 1B                  1,235,814,400    -262,668,288
for plan, size in ((llama2, "Llama-2-7B"), (llama3, "Llama-3-8B"), (small, "Llama-3.2-1B")):
    published = Llama(LlamaConfig.preset(size), rng=None)
    assert Model(plan).num_parameters() == published.num_parameters()

# %% [markdown]
# ## 5. Qwen3: normalized queries and keys
# The scores q · k / √D grow with the square of the weights' scale, and if they are large, softmax selects a
# single key. Qwen3 normalizes each head of q and k, so that no score exceeds √D (times the norms' learned
# scales). And the size of a head is a number of its own.

# %%
q, k = (Tensor(rng.standard_normal((1, 1, 16, 64))) for _ in range(2))
for factor in (1, 10, 100):
    raw = np.abs((factor**2 * (q @ k.swapaxes(2, 3)) / 8).data).max()
    normed = np.abs((F.rms_norm(factor * q, 64) @ F.rms_norm(factor * k, 64).swapaxes(2, 3) / 8).data).max()
    print(f"q and k x {factor:3}: largest score {raw:8,.1f}, of normalized ones {normed:.1f}")
    assert normed <= math.sqrt(64)
# > q and k x   1: largest score      2.9, of normalized ones 2.8
# > q and k x  10: largest score    287.4, of normalized ones 2.8
# > q and k x 100: largest score 28,742.0, of normalized ones 2.8

plan = replace(small, vocabulary=151936, context=40960, layers=28, channels=1024, heads=16, inner=3072)
plan = step(plan, "a Llama of Qwen3's sizes")
plan = step(plan, "heads of 128 channels, not of 64", head_size=128)
qwen3 = step(plan, "5. norms of q and k: Qwen3 0.6B", qk_norm=True, rope_theta=1e6, eps=1e-6)
# > a Llama of Qwen3's sizes                         507,962,368              +0
# > heads of 128 channels, not of 64                 596,042,752     +88,080,384
# > 5. norms of q and k: Qwen3 0.6B                  596,049,920          +7,168
assert Model(qwen3).num_parameters() == 596_049_920  # as published

# %% [markdown]
# ## Gemma 3
# 6. The scale of an RMSNorm is 1 + w, and the weight w starts at 0.
# 7. The outputs of attention and MLP are normalized, too, before they are added to the residual stream.
# 8. GeGLU: GELU in place of SiLU.
# 9. Five of six layers see a window only, 512 positions in the smallest model.
# 10. Within a window theta is 10,000, so that near positions are told apart; in the other layers 1,000,000.
# 11. Embeddings are multiplied by √C, because the head shares their weight, whose rows have a length of
#     about 1: so the residual stream begins with numbers of about 1.
#
# Only the norms cost parameters. The windows save what long texts cost: the cache and the scores.

# %%
plan = replace(qwen3, vocabulary=262144, context=32768, layers=18, channels=640, heads=4, kv_heads=1,
               head_size=256, inner=2048)  # fmt: skip
plan = step(plan, "a Qwen3 of Gemma 3's sizes")
plan = step(plan, "6. scales of 1 + w", norm=nn.OffsetRMSNorm)
plan = step(plan, "7. norms after attention and MLP", norms_after=True)
plan = step(plan, "8. GeGLU", gate="gelu")
full = step(plan, "11. scaled embeddings", scale=math.sqrt(640))
gemma3 = step(full, "9., 10. windows with their own theta: 270M", window=512, local_theta=1e4)
# > a Qwen3 of Gemma 3's sizes                       268,075,136              +0
# > 6. scales of 1 + w                               268,075,136              +0
# > 7. norms after attention and MLP                 268,098,176         +23,040
# > 8. GeGLU                                         268,098,176              +0
# > 11. scaled embeddings                            268,098,176              +0
# > 9., 10. windows with their own theta: 270M       268,098,176              +0
assert Model(gemma3).num_parameters() == 268_098_176  # as published
assert Gemma3(Gemma3Config.preset("Gemma-3-270M"), rng=None).num_parameters() == 268_098_176

# %% [markdown]
# ## What a long text costs
# Decoding caches the keys and values of all positions: 2 · layers · key-value heads · head size numbers per
# token, in a layer with a window of its last tokens only. In float32 (half precision needs half of it), and
# with the multiplications of scores and values, Q Kᵀ and P V, for the last token:


# %%
def at(tokens, plan):
    """Bytes of the cache and FLOPs of attention for one more token, after so many."""
    seen = sum(min(tokens, plan.window_of(i) or tokens) for i in range(plan.layers))
    kv_heads = plan.heads if plan.kv_heads is None else plan.kv_heads
    return 2 * seen * kv_heads * plan.each_head * 4, 4 * seen * plan.heads * plan.each_head


sizes = {"GPT-2 124M": gpt2_plan, "Llama 2 7B": llama2, "Llama 3 8B": llama3, "Llama 3.2 1B": small,
         "Qwen3 0.6B": qwen3, "Gemma 3 270M, full": full, "Gemma 3 270M": gemma3}  # fmt: skip
for name, each in sizes.items():
    cache, flops = at(each.context, each)
    print(f"{name:18}  {each.context:7,} tokens: {cache / 2**30:5.2f} GiB, {flops / 1e6:9,.1f} MFLOP")
# > GPT-2 124M            1,024 tokens:  0.07 GiB,      37.7 MFLOP
# > Llama 2 7B            4,096 tokens:  4.00 GiB,   2,147.5 MFLOP
# > Llama 3 8B            8,192 tokens:  2.00 GiB,   4,295.0 MFLOP
# > Llama 3.2 1B        131,072 tokens:  8.00 GiB,  17,179.9 MFLOP
# > Qwen3 0.6B           40,960 tokens:  8.75 GiB,   9,395.2 MFLOP
# > Gemma 3 270M, full   32,768 tokens:  1.12 GiB,   2,415.9 MFLOP
# > Gemma 3 270M         32,768 tokens:  0.20 GiB,     434.1 MFLOP
assert at(1000, llama2)[0] == 4 * at(1000, llama3)[0]

# %% [markdown]
# ## In a picture
# The same cache against the length of the text, as far as each model was trained for. Grouped-query attention
# makes the slope smaller, and windows make all but a sixth of it end after 512 tokens.

# %%
figure, [[axes]] = new_figure(7, 3.5)
for name, each in sizes.items():
    lengths = np.geomspace(64, each.context, 60).astype(int)
    axes.loglog(lengths, [at(length, each)[0] / 2**20 for length in lengths], label=name)
axes.set_xlabel("tokens")
axes.set_ylabel("cache (MiB)")
axes.legend(frameon=False, fontsize="small")
show("runs/10_cache.png", figure)
# > picture: runs/10_cache.png

# %% [markdown]
# ## Is it Llama? Is it Gemma?
# Small models with all changes, and tinyllm's with the same weights, in float64. The names of the parameters
# equal the checkpoint's, so `load_state_dict` copies them all.


# %%
def compare(plan, theirs):
    mine = Model(plan, rng).astype(np.float64)
    theirs = theirs.astype(np.float64).eval()
    for parameter in theirs.parameters():  # norms too
        parameter.data += 0.2 * rng.standard_normal(parameter.shape)
    mine.load_state_dict(theirs.state_dict())
    ids = rng.integers(0, 100, (2, 64))
    difference = np.abs(mine(ids).data - theirs(ids).data).max()
    print(f"{type(theirs).__name__}: largest difference of {mine(ids).size:,} logits: {difference:.0e}")
    assert difference < 1e-12


tiny = dict(vocabulary=100, context=64, channels=32, heads=4, kv_heads=2, inner=48)
same = dict(vocab_size=100, max_position_embeddings=64, hidden_size=32, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48)  # fmt: skip
plan = replace(llama3, layers=2, rope_theta=1e4, **tiny)
compare(plan, Llama(LlamaConfig(**same, num_hidden_layers=2, rms_norm_eps=1e-5), rng=rng))
plan = replace(gemma3, layers=6, head_size=8, window=9, scale=math.sqrt(32), **tiny)
sizes = dict(num_hidden_layers=6, head_dim=8, query_pre_attn_scalar=8, sliding_window=9)
compare(plan, Gemma3(Gemma3Config(**same, **sizes), rng=rng))
# > Llama: largest difference of 12,800 logits: …
# > Gemma3: largest difference of 12,800 logits: …

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why does Llama leave out the biases?</summary>
#
# They are 0.02% of Llama 2's parameters and hardly change what a layer with a norm before it can compute.
# Without them there is one kind of parameter less to store, to train and to decay.
#
# </details>
#
# <details><summary>2. Which of the changes makes training better, and which generating cheaper?</summary>
#
# SwiGLU and the norms are about training: a lower loss or a steadier run for the same work. Grouped-query
# attention and windows are about generating: a smaller cache, of which every new token reads all.
#
# </details>
#
# <details><summary>3. Five of six layers of Gemma 3 see 512 positions only. How can it use what stands 10,000
# tokens before?</summary>
#
# The sixth layer sees everything. And a window reaches further than its width: the position 511 before has
# itself seen as far back in the layer below, so information can move on from layer to layer.
#
# </details>
#
# ## Read on
# `tinyllm/models/rope.py` also stretches rotations for longer texts; `tinyllm/models/cache.py` keeps the keys
# and values, and `tinyllm info --model Llama-3.2-1B` prints the memory of a model. Next: 11 chat.
