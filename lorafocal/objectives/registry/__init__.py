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

_FAMILIES = (PAIRS, AVERAGES, JUDGED, TOKENS, VOCABULARY, GUIDED, STEPS, SETS, ANSWERS)
OBJECTIVES: dict[str, Entry] = {name: entry for family in _FAMILIES for name, entry in family.items()}
