"""`truncation: recipe` against the ids that TRL 0.11.4 made of the same rows: equal, or dropped for a named reason."""

from __future__ import annotations

from collections import Counter

import pytest

from lorafocal.data.sources import Preference
from lorafocal.data.tokens import TokenizedData, TokenizedPair, tokenize_preferences
from tests.era.golden import golden
from tests.era.subjects import LIMITS, all_tokenizers, rows_for

TOKENIZERS = all_tokenizers()
Golden = list[list[list[int]]] | None  # [prompt, answer] of chosen and of rejected; None where TRL ended with an error


def ours(name: str, limits: tuple[int, int]) -> TokenizedData:
    tokenizer = TOKENIZERS[name]
    rows = [Preference(*row.values(), id=str(place)) for place, row in enumerate(rows_for(tokenizer))]
    return tokenize_preferences(rows, tokenizer, max_length=limits[0], truncation="recipe", max_prompt_length=limits[1])


def theirs(name: str, limits: tuple[int, int]) -> list[Golden]:
    return golden()["ids"][name][f"{limits[0]} {limits[1]}"]


def reason(sides: Golden) -> str | None:
    """Why a pair of theirs is none of ours."""
    if sides is None or sides[0][0] != sides[1][0]:
        return "seam_lost"  # two prompts, or none
    if not sides[0][0]:
        return "empty_prompt"
    return "identical_completions" if sides[0][1] == sides[1][1] else None


@pytest.mark.row("25", "28")
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_trl_0_11_4(name: str, limits: tuple[int, int]) -> None:
    wanted = theirs(name, limits)
    assert len(wanted) == len(rows_for(TOKENIZERS[name]))
    reasons = [reason(sides) for sides in wanted]
    data = ours(name, limits)
    assert data.drops == Counter(filter(None, reasons))
    found = [(pair.id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in data.pairs]
    assert found == [
        (str(place), sides[0][0], sides[0][1], sides[1][1])
        for place, (sides, why) in enumerate(zip(wanted, reasons, strict=True))
        if sides is not None and why is None
    ]


@pytest.mark.row("25", "28")
def test_the_golden_rows_hold_every_case() -> None:
    """So that equal ids mean something: seams, both cuts, a lost EOS, and ends of turn with an EOS after them."""
    whole, *cut = LIMITS
    merging = theirs("plain gpt-2", whole)
    assert None in merging  # TRL's own end
    different = [sides for sides in merging if sides is not None and sides[0][0] != sides[1][0]]
    assert {len(sides[0][0]) - len(sides[1][0]) for sides in different} >= {-1, 1}
    data = ours("plain gpt-2", whole)
    assert data.seam_merges > 0  # merged alike on both sides, and kept
    assert data.drops["seam_lost"] == len(different) + merging.count(None)
    for name, tokenizer in TOKENIZERS.items():
        kept = {limits: ours(name, limits) for limits in LIMITS}
        pairs = [one for limits in cut for one in kept[limits].pairs]
        assert kept[whole].cut == 0
        assert sum(kept[limits].cut for limits in cut) > len(cut)
        assert all(_ends(one, tokenizer.eos_token_id) for one in kept[whole].pairs)
        assert not all(_ends(one, tokenizer.eos_token_id) for one in pairs)
        if tokenizer.bos_token_id is not None:
            assert all(one.prompt_ids[0] == tokenizer.bos_token_id for one in kept[whole].pairs)
            assert not all(one.prompt_ids[0] == tokenizer.bos_token_id for one in pairs)


def _ends(pair: TokenizedPair, eos: int) -> bool:
    return pair.chosen_ids[-1] == pair.rejected_ids[-1] == eos


@pytest.mark.row("24")
@pytest.mark.parametrize(
    ("name", "begins", "ends"),
    [
        ("llama-3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("llama-3 at first", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|><|end_of_text|>"),
        ("zephyr", "<|assistant|>\n", "</s>\n</s>"),
        ("mistral", "", " </s>"),
    ],
)
def test_answers_begin_with_the_header_and_end_with_eos(name: str, begins: str, ends: str) -> None:
    for pair in ours(name, LIMITS[0]).pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            said = TOKENIZERS[name].decode(ids).replace("</s> ", "</s>")  # such tokenizers put a blank before text
            assert said.startswith(begins)
            assert said.endswith(ends)
