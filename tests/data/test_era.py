"""What `truncation: recipe` renders and refuses; its ids are held against TRL's own in tests/era."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafocal.data.encoding import Seam
from lorafocal.data.era import split
from lorafocal.data.sources import Preference
from lorafocal.data.tokens import TokenizedData, tokenize_preferences
from lorafocal.errors import InputError
from tests.data.test_tokens import LLAMA_3_LIKE, MISTRAL_LIKE, QWEN_LIKE, byte_tokenizer, chat, pair

MESSAGE_BY_MESSAGE = LLAMA_3_LIKE.replace(
    "{{ bos_token }}", "{% if messages[0]['role'] != 'assistant' %}<s>{% endif %}"
)


def as_era(preference: Preference, tokenizer: Any) -> TokenizedData:
    return tokenize_preferences([preference], tokenizer, max_length=1000, truncation="recipe", max_prompt_length=900)


def texts(preference: Preference, tokenizer: Any) -> tuple[str, ...]:
    [one] = as_era(preference, tokenizer).pairs
    return tuple(tokenizer.decode(ids) for ids in (one.prompt_ids, one.chosen_ids, one.rejected_ids))


@pytest.mark.row("23", "24")
@pytest.mark.parametrize("template", [LLAMA_3_LIKE, MESSAGE_BY_MESSAGE], ids=["BOS before an answer", "none"])
def test_a_sequence_has_one_bos_whatever_an_answer_alone_begins_with(template: str) -> None:
    header = "<|start|>assistant<|stop|>\n\n"
    assert texts(chat("hi", "yes", "no"), byte_tokenizer(template, eos_token="<|eot|>")) == (
        "<s><|start|>user<|stop|>\n\nhi<|eot|>", f"{header}yes<|eot|>", f"{header}no<|eot|>"
    )  # fmt: skip


@pytest.mark.row("23", "24")
def test_plain_text_gets_a_bos_also_where_the_tokenizer_would_write_none() -> None:
    tokenizer = byte_tokenizer(bos=False, bos_token="<s>")
    assert texts(pair("hi ", "yes", "no"), tokenizer) == ("<s>hi ", "yes</s>", "no</s>")
    [usual] = tokenize_preferences([pair("hi ", "yes", "no")], tokenizer, max_length=99).pairs
    assert tokenizer.decode(usual.prompt_ids) == "hi "


@pytest.mark.row("26")
@pytest.mark.parametrize(
    ("template", "says"), [(QWEN_LIKE, r"writes .*Be kind"), (MISTRAL_LIKE, r"refuses it \(roles must alternate\)")]
)
def test_a_template_that_writes_an_answer_alone_in_another_way_is_refused(template: str, says: str) -> None:
    row = chat("hi", "yes", "no", "row 7")
    tokenizer = byte_tokenizer(template)
    assert tokenize_preferences([row], tokenizer, max_length=1000).pairs
    with pytest.raises(InputError, match=rf"row 7: truncation: recipe .*{says}.*use another truncation"):
        as_era(row, tokenizer)


def test_a_message_that_the_template_leaves_out_drops_the_pair() -> None:
    silent = "{% for m in messages if m['role'] != 'system' %}<|start|>{{ m['content'] }}</s>{% endfor %}"
    lost = chat("hi", "yes", "no")
    lost = Preference([{"role": "system", "content": "be"}, *lost.prompt], lost.chosen, lost.rejected, "lost")  # type: ignore[misc]
    rows = [lost, chat("hi", "yes", "no")]
    data = tokenize_preferences(rows, byte_tokenizer(silent), max_length=99, truncation="recipe", max_prompt_length=50)
    assert data.drops == {"text_left_out": 1}
    assert len(data.pairs) == 1


@pytest.mark.row("25")
def test_a_merge_on_one_side_drops_the_pair_and_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"1 seam_lost \(such as pair\): .*end such prompts with a line feed"):
        as_era(pair("(y", "es", "no"), byte_tokenizer())
    assert texts(pair("(y", "es", "et"), byte_tokenizer()) == ("<s>(", "s</s>", "t</s>")  # `ye` in neither
    assert as_era(pair("(y", "es", "et"), byte_tokenizer()).seam_merges == 1


IDS = st.lists(st.integers(0, 3), max_size=6)


@settings(max_examples=300)
@given(before=IDS, tail=IDS, joint=IDS)
def test_a_split_is_that_of_the_whole_joint_ids(before: list[int], tail: list[int], joint: list[int]) -> None:
    """The oracle looks at whole texts, as TRL's function does; ours at their ends."""
    alone, together = before + tail, before + joint
    found = split(Seam(alone, tail, joint))
    if len(together) < len(alone):
        assert found is None
        return
    start = len(alone) if together[: len(alone)] == alone else len(alone) - 1
    assert found is not None
    assert (found.prompt_ids, found.completion_ids) == (together[:start], together[len(alone) :])
    assert found.merged == (start < len(alone))
