# %% [markdown]
# # Tokens
#
# A language model reads numbers. After this chapter you can say what a token is, learn a byte-pair encoding
# from a text, and explain why models are bad at counting letters. 10 minutes; no prerequisites.
#
# Read along: `tinyllm/tokenizers/bpe.py`. Exercise: `examples/exercises/17_bpe.py`.

# %%

from tinyllm import load_tokenizer
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tools.plot import new_figure, show
from tinyllm.tools.show import show_tokens

TEXT = """I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it was no
great surprise to me to hear that, in the height of his glory, he had dropped his painting, married a rich
widow, and established himself in a villa on the Riviera. (Though I rather thought it would have been Rome or
Florence.) "The height of his glory"--that was what the women called it. I can hear Mrs. Gideon Thwing--his
last Chicago sitter--deploring his unaccountable abdication. "Of course it's going to send the value of my
picture 'way up; but I don't think of that, Mr. Rickham--the loss to Arrt is all I think of." The word, on
Mrs. Thwing's lips, multiplied its rs as though they were reflected in an endless vista of mirrors."""
# The beginning of "The Verdict" (Edith Wharton, 1908, public domain)

# %% [markdown]
# ## Characters
# The simplest vocabulary has an id for each character of a text. It is small, but the sequences are long, and
# a character that the text does not contain cannot be encoded at all.

# %%
characters = CharTokenizer.from_text(TEXT)
ids = characters.encode("the height")
print(len(TEXT), "characters,", characters.vocab_size, "of them different")
print(ids, characters.decode(ids))
# > 737 characters, 44 of them different
# > [39, 29, 26, 1, 29, 26, 30, 28, 29, 39] the height

# %% [markdown]
# ## Bytes
# Every text is a sequence of bytes in UTF-8, and there are only 256 of them: nothing is unknown. But a
# character outside ASCII takes two to four, and a part of one is not text.

# %%
for text in ("e", "é", "語"):
    print(text, list(text.encode("utf-8")))
# > e [101]
# > é [195, 169]
# > 語 [232, 170, 158]

# %% [markdown]
# ## Merging
# Byte-pair encoding begins with the bytes and merges, again and again, the most frequent pair of neighbours
# into a new token (Sennrich et al., arXiv 1508.07909). The text is first cut into pieces, roughly words with
# the space in front of them, and no pair spans two. The first merges of this text:

# %%
merges = train_bpe(TEXT, vocab_size=257 + 60)
tokenizer = BPETokenizer(merges)
for i, pair in enumerate(merges[:6]):
    left, right = (tokenizer.decode([id]) for id in pair)
    print(f"{left!r} + {right!r} -> {left + right!r}, id {256 + i}")
# > 'h' + 'e' -> 'he', id 256
# > ' ' + 't' -> ' t', id 257
# > 'i' + 'n' -> 'in', id 258
# > 'i' + 's' -> 'is', id 259
# > ' ' + 'a' -> ' a', id 260
# > 'o' + 'u' -> 'ou', id 261

# %% [markdown]
# A merge may join the tokens of earlier ones: " though", which the text repeats, is " th" and "ough", and
# that is "ou" and "gh". So a vocabulary fits the text that it was learned from. Its last tokens, and a
# sentence:

# %%
print([tokenizer.decode([id]) for id in range(256 + 50, 256 + 60)])
print(show_tokens(tokenizer, tokenizer.encode("I thought of the height of his glory"), colour=False))
# > ['ay', 'bu', 'de', 'el', 'er', 'hat', 'ip', 'igh', 'ied', 'om']
# > I| though|t| of| the| he|igh|t| of| his| g|lor|y
# > 40 301 83 273 281 279 313 83 273 287 277 288 88
# > 13 tokens, 36 bytes, 2.77 bytes per token

# %% [markdown]
# ## GPT-2's vocabulary
# OpenAI learned 50,000 merges from eight million web pages. A word in the middle of a sentence has another id
# than at its beginning, because the space belongs to it, and rare words are split.

# %%
gpt2 = load_tokenizer("gpt2")
print(show_tokens(gpt2, gpt2.encode("Every effort moves you. Effort? Gisburn's strawberries"), colour=False))
# > Every| effort| moves| you|.| Eff|ort|?| G|is|burn|'s| strawberries
# > 6109 3626 6100 345 13 27848 419 30 402 271 10899 338 36973
# > 13 tokens, 54 bytes, 4.15 bytes per token

# %% [markdown]
# A model sees the ids and nothing else: that "strawberries" has three letters r is not in them. It can only
# have learned it from texts that say so.
#
# ## What does a larger vocabulary buy?
# Fewer tokens for the same text, so a longer text fits in the context; and every step of the model works on
# more bytes. It costs a row in the embedding and in the head for each id, and an id that is rare is learned
# from few examples.

# %%
sizes = range(257, 257 + 91, 10)
per_token = []
for size in sizes:
    learned = BPETokenizer(train_bpe(TEXT, size))
    per_token.append(len(TEXT.encode()) / len(learned.encode(TEXT)))
print([f"{ratio:.2f}" for ratio in per_token])
figure, [[axes]] = new_figure(6, 3)
axes.plot(sizes, per_token, marker="o", markersize=3)
axes.set_xlabel("vocabulary (256 bytes, the merges, and the end of text)")
axes.set_ylabel("bytes per token")
show("runs/03_tokens.png", figure)
# > ['1.00', '1.17', '1.29', '1.41', '1.50', '1.58', '1.66', '1.73', '1.82', '1.91']
# > picture: runs/03_tokens.png

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is the text cut into pieces before pairs are counted?</summary>
#
# Otherwise frequent phrases become tokens (" of the"), with every punctuation mark that follows them: "dog."
# "dog!" "dog?" would be three tokens that have nothing in common for the model. Cutting also makes learning
# fast: equal pieces are counted once.
#
# </details>
#
# <details><summary>2. A token of GPT-2 can be a part of a character. Why does a program that prints a text
# while it is generated have to know that?</summary>
#
# The bytes of one token need not be valid UTF-8. It must wait for the tokens that complete the character:
# `text_stream` in `tinyllm/inference/chat.py` does.
#
# </details>
#
# <details><summary>3. What happens if a user types the text "<|endoftext|>"?</summary>
#
# It looks like the special token that separates documents. `encode` refuses it unless you say with `special=`
# whether it means the token or the characters, because a guess would let a text end itself.
#
# </details>
#
# ## Read on
# `tinyllm/tokenizers/base.py` has what all tokenizers share, special tokens among it; `load_tokenizer` in
# `tinyllm/tokenizers/__init__.py` recognises the formats of other libraries. Next: 04 batches.
