"""How is an adapter around frozen layers trained on your own arrays? With LoRA (arXiv 2106.09685)."""

import numpy as np

from tinyllm import GPT2, GPT2Config, generate, nn, training


class Adapter(nn.Module):  # y = layer(x) + B A x with A (rank, in) and B (out, rank)
    def __init__(self, layer, channels_in, channels_out, rank, rng):
        self.layer = layer
        self.A = nn.Linear(channels_in, rank, bias=False, rng=rng, std=0.1)
        self.B = nn.Linear(rank, channels_out, bias=False, rng=rng, std=0.0)  # initially B A x = 0

    def forward(self, x):
        return self.layer(x) + self.B(self.A(x))


def batch_at(step):  # counting up from random digits: ids and targets (8, 32)
    digits = np.random.default_rng(step).integers(0, 10, (8, 1)) + np.arange(33)
    return digits[:, :-1] % 10, digits[:, 1:] % 10


rng = np.random.default_rng(0)
sizes = dict(vocab_size=10, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
model = GPT2(GPT2Config(**sizes), rng=rng).requires_grad_(False)
print(nn.replace(model, "h.*.attn.c_attn", lambda name, layer: Adapter(layer, 64, 3 * 64, rank=4, rng=rng)))
print("trained:", sum(p.size for p in model.parameters() if p.requires_grad), "of", model.num_parameters())
records = training.fit(model, batch_at, steps=20, lr=0.05)
print(f"loss: {records[0]['loss']:.2f} -> {records[-1]['loss']:.2f}")  # loss: 2.69 -> 0.70
print("3 4 5", *(int(ids[0]) for ids in generate(model, [[3, 4, 5]], 8, temperature=0)))  # 6 7 8 9 0 1 2 3
