"""The one list of objectives, family by family. Imports no torch, so that configs can ask it."""

from __future__ import annotations

from lorafocal.objectives.entry import Entry
from lorafocal.objectives.registry.answers import ANSWERS
from lorafocal.objectives.registry.averages import AVERAGES
from lorafocal.objectives.registry.guided import GUIDED
from lorafocal.objectives.registry.judged import JUDGED
from lorafocal.objectives.registry.pairs import PAIRS
from lorafocal.objectives.registry.sets import SETS
from lorafocal.objectives.registry.steps import STEPS
from lorafocal.objectives.registry.tokens import TOKENS
from lorafocal.objectives.registry.vocabulary import VOCABULARY

FAMILIES: dict[str, dict[str, Entry]] = {
    "of the log-probs of whole answers": PAIRS,
    "of lengths, or of mean log-probs a token": AVERAGES,
    "of a judge's scores": JUDGED,
    "of single tokens": TOKENS,
    "of the whole vocabulary at each token": VOCABULARY,
    "of one more adapter, the guide": GUIDED,
    "of all pairs of a step": STEPS,
    "of all answers to a prompt": SETS,
    "of a further answer": ANSWERS,
}
OBJECTIVES: dict[str, Entry] = {name: entry for family in FAMILIES.values() for name, entry in family.items()}
