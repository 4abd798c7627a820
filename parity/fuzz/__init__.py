"""Every file that tinyllm reads, broken in every way: refused in one sentence, or loaded as it should be."""
