"""A solution of exercise 16, the learning rate."""

import math


def learning_rate(step, steps, warmup, lr, final_lr):
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - 1 - warmup)
    return final_lr + 0.5 * (lr - final_lr) * (1 + math.cos(math.pi * done))
