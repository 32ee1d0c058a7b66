"""Writes docs/architectures.md: what each family of models trains in, found out by trying. Run it after a change:

python -m tests.model.architecture_table
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafocal.data.packing import pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.policy import own_attention, plain_attention, token_logps
from lorafocal.probes import choose_layout
from tests.model.families import IMAGE_TEXT, MUST_TRAIN_PACKED, known_families, random_model
from tests.tiny import pairs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
BOUNDS = (1e-13, 1e-11, 1e-5)  # rough, so that every machine prints the same
REFUSED = "refused"

INTRODUCTION = """\
# Architectures

Which models train, and how. Written by `python -m tests.model.architecture_table` from tiny random models in float64;
a test makes the table again.

- **packed**: prompts shared, no padding; the fastest layout. **twin**: right-padded rows, each prompt twice; right, and
  slower. **refused**: named at load with the reason.
- `packing.layout: auto` finds this out for the model at hand, by calling it: which layers call the attention interface,
  whether one pair moves another, whether a token sees what comes after it, whether scores are those of the model's own
  logits. Nothing depends on a model's name, so a family that is not listed is tried the same way.
- The error is the largest difference of a token's log-probability, in nats, between the layout and one sequence at a
  time on transformers' own attention. Gemma-2 and VaultGemma cap their attention scores, for which transformers has
  only an attention that rounds its softmax to fp32 (to that they agree within 1e-6): they are compared with ours, one
  sequence at a time. Where a bound is 1e-5, the model itself rounds to fp32 within.
- Soft-capped scores and attention sinks train packed everywhere: on a GPU in bf16 by a kernel that has them, else
  segment by segment.
- Of an image-text model the text part trains. Mixtures of experts: routing depends on a token alone, and auxiliary
  losses do not enter; adapters go on linear layers, so not on fused experts.
- A family can be refused here and yet train in one of its variants: what counts is what `auto` finds at load.

"""


@dataclass(frozen=True, slots=True)
class Row:
    """What was found out about one family; `error` in nats, NaN where it was refused."""

    family: str
    model_class: str
    layout: str
    error: float
    attention: str
    reason: str

    @property
    def bound(self) -> float:
        return next((bound for bound in BOUNDS if self.error < bound), torch.inf)

    def __str__(self) -> str:
        error = "" if self.layout == REFUSED else f"< {self.bound:.0e}"
        cells = (f"`{self.family}`", self.model_class, self.layout, error, self.attention, self.reason)
        return f"| {' | '.join(cells)} |"


@torch.no_grad()
def row_of(family: str) -> Row:
    """Choose the family's layout as training does, and measure it."""
    model = random_model(family)
    name = type(model).__name__
    try:
        choice = choose_layout(model, "auto")
    except InputError as refusal:
        return Row(family, name, REFUSED, torch.nan, "", str(refusal))
    batch = pairs(5)
    pack = share_prefixes(batch) if choice.layout == "packed" else pad_sequences(batch)
    error = float((token_logps(model, pack) - one_at_a_time(model, batch)).abs().max())
    attention = "ours" if only_ours_is_exact(model) else own_attention(model)
    return Row(family, name, "packed" if choice.layout == "packed" else "twin", error, attention, choice.reason)


def only_ours_is_exact(model: nn.Module) -> bool:
    """transformers knows soft-caps in an attention that rounds to fp32 alone."""
    return getattr(causal_lm(model).config.get_text_config(), "attn_logit_softcapping", None) is not None


def one_at_a_time(model: nn.Module, batch: list[TokenizedPair]) -> Tensor:
    """Token log-probs of all chosen answers, then all rejected ones, each sequence in a call of its own."""
    alone = [replace(pair, rejected_ids=[]) for pair in batch]
    alone += [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=[]) for pair in batch]
    if only_ours_is_exact(model):
        return torch.cat([token_logps(model, share_prefixes([pair])) for pair in alone])
    with plain_attention(model):
        return torch.cat([_from_logits(model, pair.prompt_ids, pair.chosen_ids) for pair in alone])


def _from_logits(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def page(rows: Iterable[Row]) -> str:
    """The document."""
    rows = list(rows)
    sections = {
        "Must train packed": [row for row in rows if row.family in MUST_TRAIN_PACKED],
        "Others": [row for row in rows if row.family not in MUST_TRAIN_PACKED and row.family not in IMAGE_TEXT],
        "Image-text models, text part": [row for row in rows if row.family in IMAGE_TEXT],
    }
    head = "| family | class | layout | error | compared with | reason |\n|---|---|---|---|---|---|"
    tables = (
        f"## {title}\n\n{head}\n" + "\n".join(map(str, sorted(part, key=lambda row: row.family))) + "\n"
        for title, part in sections.items()
    )
    return INTRODUCTION + "\n".join(tables)


if __name__ == "__main__":
    PAGE.write_text(page(map(row_of, known_families())), encoding="utf-8")
