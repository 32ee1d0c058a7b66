"""Writes the tables of docs/reproduction.md from the recipes and from `lorafocal plan`:

python -m tests.reproduction_page
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafocal import recipes
from lorafocal.config import layers, load_config
from lorafocal.plan import plan
from tests.made_parts import made_anew

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduction.md"
FAMILIES = ("mistral-7b", "llama3-8b")
OTHERS = ("dpo", "odpo", "focal-hard", "kto", "orpo", "simpo")
ALIKE = ("dpo", "odpo", "focal-hard")  # which cost what focalpo costs
MACHINES = ("8xA100-40", "8xA100-80")
ENGINES = ("zero2", "zero3")
COSTS = {
    "FocalPO, DPO, ODPO, hard emphasis; stored reference": ("focalpo", ()),
    "the same; live reference": ("focalpo", ("reference={kind: separate_model, model: THE_BASE}",)),
    "KTO; stored reference": ("kto", ()),
    "ORPO, SimPO; no reference": ("orpo", ()),
}
"""What a row of the table of costs says: words, the recipe, and what it overrides."""


def page(text: str) -> str:
    """The page with its tables made anew."""
    return made_anew(text, values=values(), others=others(), costs=costs(), released=released())


def values() -> Iterator[str]:
    """Every value of the two FocalPO recipes, with where it is from."""
    yield from head("key", "Mistral", "Llama-3")
    told = [_told(f"{family}-focalpo") for family in FAMILIES]
    for key in told[0]:
        yield row(f"`{key}`", *(f"{found[key][0]} ({found[key][1].kind})" for found in told))


def others() -> Iterator[str]:
    """What each other recipe says otherwise than its family's FocalPO."""
    yield from head("recipe", "Mistral", "Llama-3", "the training as a whole")
    for name in OTHERS:
        cells = [", ".join(f"`{key}` {value}" for key, value in _own(f"{family}-{name}")) for family in FAMILIES]
        yield row(name, *cells, str(_marks(f"{FAMILIES[0]}-{name}")["recipe"]).replace(", Mistral", ""))


def costs() -> Iterator[str]:
    """Duration and GPU-hours of each recipe, as `lorafocal plan` computes them."""
    yield from head("recipe", *(f"{machine[2:]} {engine}" for machine in MACHINES for engine in ENGINES))
    for family in FAMILIES:
        for words, (objective, overrides) in COSTS.items():
            cells = (
                cost(f"{family}-{objective}", engine, machine, overrides) for machine in MACHINES for engine in ENGINES
            )
            yield row(f"{family}: {words}", *cells)


def cost(name: str, engine: str, machine: str, overrides: Sequence[str] = ()) -> str:
    """Of one recipe on one machine."""
    config = load_config(recipes.path_of(name), [f"engine.kind={engine}", *overrides])
    [found] = plan(config, machine).machines
    if not found.fits or found.speed is None:
        return "does not fit"
    return f"{found.speed.hours * 60:.0f} min, {found.speed.gpu_hours:.1f} GPU-hours"


def released() -> Iterator[str]:
    """The models of configs/paper/released.yaml."""
    yield from head("row", "family", "model", "trained from", "the id is")
    for entry in recipes.released():
        yield row(entry.row, entry.family, f"`{entry.model}`", f"`{entry.trained_from}`", str(entry.mark))


def _told(name: str) -> dict[str, tuple[str, recipes.Mark]]:
    """Value and mark of every key of a recipe but its labels and its model's shape."""
    config, marks = load_config(recipes.path_of(name)).model_dump(mode="json"), _marks(name)
    stated = [key for _, own in layers(recipes.path_of(name)) for key in _leaves(own)]
    shown = [key for key in dict.fromkeys(stated) if not key.startswith(("name", "recipe", "model.shape"))]
    return {key: (_text(_at(config, key)), marks[key]) for key in shown}


def _own(name: str) -> Iterator[tuple[str, str]]:
    """Keys of a recipe's own file, but its labels and what it takes away."""
    *_, (_, own) = layers(recipes.path_of(name))
    for key in _leaves(own):
        value = _at(own, key)
        if key not in ("name", "recipe") and (value is not None or key == "reference"):
            yield key, _text(value)


def _marks(name: str) -> dict[str, recipes.Mark]:
    return recipes.marks([file for file, _ in layers(recipes.path_of(name))])


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and "path" not in value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _at(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "; ".join(f"{source['path']}, {source['split']}" for source in value)
    if isinstance(value, float) and 0 < value < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return value if isinstance(value, str) else json.dumps(value)


def head(*names: str) -> Iterator[str]:
    yield row(*names)
    yield "|" + "---|" * len(names)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
