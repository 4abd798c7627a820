"""Exercise 13: the key-value cache.

Keys and values of earlier positions do not change when a text grows, so they are kept. The new tokens' keys
and values are appended to the cached ones, and the new queries attend to all of them: the new query number t
(from 0) is the position held + t of the text, where held is the number of cached positions, and sees
everything up to itself.

Return the result and all keys and values, which are the cache of the next step.

When you are done, compare with ``tinyllm/models/cache.py``.
Grade it: python -m parity grade examples/exercises/13_kv_cache.py
"""


def cached_attention(q, k, v, cached_k, cached_v):
    """(y, keys, values) for q, k, v (T, D) of the new tokens and cached_k, cached_v (held, D); held may be 0.

    y is (T, D), keys and values are (held + T, D).
    """
    raise NotImplementedError
