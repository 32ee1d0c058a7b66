"""Token ids as the texts that they add, one by one."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 4  # tokens decoded before a token: some tokenizers drop the space before the first one
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for a part of a character's bytes


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, before: Sequence[int] = ()
) -> tuple[str, ...]:
    """What each token adds to the text of those before it, special tokens spelled out; `before` come first.

    Of tokens that share a character the last one has it, the others are empty. Joined, they are the whole text.
    """
    whole = [*before[-CONTEXT:], *ids]
    place = told = len(whole) - len(ids)  # up to `told` the text is told
    texts = []
    for end in range(place + 1, len(whole) + 1):
        start = max(0, told - CONTEXT)
        known, text = (str(tokenizer.decode(whole[start:stop])) for stop in (told, end))
        if text.endswith(INCOMPLETE) and end < len(whole):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        told = end
    return tuple(texts)
