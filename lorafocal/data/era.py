"""`truncation: recipe`: texts and ids as TRL 0.9 to 0.11, Zephyr's recipe, SimPO and Lions made them.

Conversations. The prompt is rendered without the generation prompt and each answer alone, so that the header of the
assistant's turn is part of both answers: it cancels in a margin and counts in log-probs, rewards and lengths. A BOS
that an answer begins with is taken away, as SimPO does; with it a sequence would have two. Refused: a template that
writes something else for an answer alone than for the same answer in its conversation.

Ends. A BOS before the prompt and an EOS after each answer, where the tokenizer has them and they are not there: also
after what a template writes behind its own end of turn (Zephyr's line feed), unlike everywhere else here.

The seam, as in TRL 0.11.4: where a merge crosses it, the joint tokenisation is cut where the prompt alone would end,
and the token before that is in neither part. Both answers must keep the same prompt, so a pair whose prompts then
differ is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorafocal.data.dialogues import has_several_turns
from lorafocal.data.encoding import Encoder, Ids, Reading, Seam, Side, SideIds, Texts, seams
from lorafocal.data.sources import Preference
from lorafocal.data.templates import Fault, PairTexts, Renderer, is_conversation, left_out, one_eos, template_text
from lorafocal.errors import InputError

# ---- texts


def texts_apart(preferences: Sequence[Preference], encoder: Encoder) -> list[Texts]:
    """Plain text as it is; of a conversation the prompt and each answer, rendered one by one."""
    if several := next(filter(has_several_turns, preferences), None):
        raise InputError(
            f"{several.where}: truncation: recipe makes ids as its era did, which knew answers of one "
            "message, and this one has several turns; use another truncation, or leave such rows out"
        )
    chats = [preference for preference in preferences if is_conversation(preference)]
    rendered = iter(conversations_apart(chats, encoder.renderer))
    return [
        next(rendered)
        if is_conversation(preference)
        else PairTexts(preference.prompt, preference.chosen, preference.rejected)  # type: ignore[arg-type]
        for preference in preferences
    ]


def conversations_apart(chats: Sequence[Any], renderer: Renderer) -> list[PairTexts | Fault]:
    """The rendered texts of conversations, in order."""
    if chats:
        template_text(renderer.tokenizer, renderer.options)  # says what to do where there is none
    answered = [(chat.prompt, answer) for chat in chats for answer in (chat.chosen, chat.rejected)]
    prompts = renderer.render([chat.prompt for chat in chats])
    alone = iter(renderer.render([answer for _, answer in answered]))
    whole = iter(renderer.render([prompt + answer for prompt, answer in answered]))
    return [
        conversation_apart(chat, prompt, [next(alone), next(alone)], [next(whole), next(whole)], renderer)
        for chat, prompt in zip(chats, prompts, strict=True)
    ]


def conversation_apart(
    chat: Any, prompt: str | Fault, alone: list[str | Fault], whole: list[str | Fault], renderer: Renderer
) -> PairTexts | Fault:
    """The three texts of one; `alone` and `whole` are both answers, without and with the prompt before them."""
    for text in (prompt, *whole):
        if isinstance(text, Fault):
            return text
    place = chat.where
    chosen, rejected = (answer_apart(f"{prompt}", *texts, renderer, place) for texts in zip(alone, whole, strict=True))
    asked = [message for message in chat.prompt if message["role"] != "assistant"]
    for messages, text in ((asked, f"{prompt}"), (chat.chosen, chosen), (chat.rejected, rejected)):
        if lost := left_out((message["content"] for message in messages), text):
            return lost
    return PairTexts(f"{prompt}", chosen, rejected)


def answer_apart(prompt: str, alone: str | Fault, whole: str | Fault, renderer: Renderer, place: str) -> str:
    """An answer's own rendering without BOS; refused where prompt and answer do not make the conversation."""
    text = "" if isinstance(alone, Fault) else alone.removeprefix(renderer.tokenizer.bos_token or "")
    if prompt + text == whole:
        return text
    does = f"refuses it ({alone.detail})" if isinstance(alone, Fault) else f"writes {alone[:60]!r}"
    raise InputError(
        f"{place}: truncation: recipe renders each answer alone, as its era did, and this chat template then {does}, "
        f"not what stands in the conversation; use another truncation, or a template that writes messages one by one"
    )


# ---- ids


def sides_split(sides: Iterable[Side], encoder: Encoder) -> dict[Side, SideIds]:
    """Ids by prompt and answer, but of sides that TRL's own trainer ends with an error for."""
    found = {side: split(seam) for side, seam in seams(sides, encoder).items()}
    return {side: ids for side, ids in found.items() if ids is not None}


def split(seam: Seam) -> SideIds | None:
    """The joint ids in two; where the seam does not hold, one token less before it. None where they are too few."""
    end = len(seam.tail_ids)
    if len(seam.joint_ids) < end:
        return None
    before = seam.prompt_ids[: len(seam.prompt_ids) - end]
    kept = end if seam.holds else end - 1
    return SideIds([*before, *seam.joint_ids[:kept]], seam.joint_ids[end:], not seam.holds)


def share_prompt(chosen: SideIds, rejected: SideIds) -> bool:
    """Whether both answers follow the same ids; otherwise a margin would compare different prompts."""
    return chosen.prompt_ids == rejected.prompt_ids


def ends_where_missing(
    texts: PairTexts, chosen: SideIds, rejected: SideIds, encoder: Encoder
) -> tuple[Ids, Ids, Ids] | Fault:
    """A BOS and EOS where there is none."""
    if not share_prompt(chosen, rejected):
        return Fault("seam_lost")
    bos, eos = encoder.tokenizer.bos_token_id, list(one_eos(encoder.tokenizer))
    prompt_ids = chosen.prompt_ids
    if bos is not None and prompt_ids[:1] != [bos]:
        prompt_ids = [bos, *prompt_ids]
    answers = [side.completion_ids for side in (chosen, rejected)]
    ended = [ids if ids[-1:] == eos else ids + eos for ids in answers]
    return prompt_ids, ended[0], ended[1]


AS_IN_ITS_ERA = Reading(texts_apart, sides_split, ends_where_missing)
