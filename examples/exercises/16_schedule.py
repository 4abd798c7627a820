"""Exercise 16: the learning rate: warm-up and cosine.

The rate rises along a line over the first ``warmup`` steps, because AdamW's averages are poor at first, and
then falls along half a cosine to ``final_lr``. Steps count from 0, and the last is steps - 1:

    step < warmup:   lr (step + 1) / warmup,
    otherwise:       final_lr + 1/2 (lr - final_lr) (1 + cos(π s)),
                     s = (step - warmup) / (steps - 1 - warmup).

So the first step already learns, the rate is lr at step warmup, and final_lr at the last step. There are at
least two steps after the warm-up; warmup may be 0.

Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), section 3.

When you are done, compare with ``tinyllm/optim/schedules.py``, whose line begins at ``initial_lr`` and whose
cosine reaches ``min_lr`` at step ``steps``.
Grade it: python -m parity grade examples/exercises/16_schedule.py
"""


def learning_rate(step, steps, warmup, lr, final_lr):
    """The rate of a step, a number."""
    raise NotImplementedError
