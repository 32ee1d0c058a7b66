"""What keeps a result from comparing with the paper's: another judge, base, sampling, version, or fewer prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafocal import recipes
from lorafocal.evaluate.result import Result
from lorafocal.generation.presets import sampling_of

DRAWN_BY = ("temperature", "top_p", "top_k", "max_new_tokens", "system")


@dataclass(frozen=True, slots=True)
class Standard:
    """How the paper's numbers were made: `families` (bases and presets) and `benchmarks`, as results.yaml has them.

    `known` is the family of each base and each released checkpoint, by hub id, and by its last part, as a copy's
    folder is called.
    """

    families: Mapping[str, Mapping[str, Any]]
    benchmarks: Mapping[str, Mapping[str, Any]]
    known: Mapping[str, str]


def standard_of(data: Mapping[str, Any]) -> Standard:
    """The standard in results.yaml's `data`, with the checkpoints of released.yaml."""
    ids = {entry["base"]: family for family, entry in data["families"].items()}
    ids |= {released.model: released.family for released in recipes.released()}
    last_parts = {place.rpartition("/")[2]: family for place, family in ids.items()}
    return Standard(data["families"], data["benchmarks"], last_parts | ids)


def family_of(results: Iterable[Result], standard: Standard) -> str | None:
    """The paper's family that these results of one model belong to, by base or by a released checkpoint's hub id."""
    places = (place for result in results for place in _places(result))
    return next((standard.known[place] for place in places if place in standard.known), None)


def reasons(result: Result, family: str | None, standard: Standard) -> tuple[str, ...]:
    """Sentences a footnote can hold; none where nothing known keeps the number from comparing."""
    benchmark = standard.benchmarks[result.benchmark]
    preset = benchmark.get("preset") or standard.families.get(family or "", {}).get("preset")
    return (
        *_judge(result, benchmark),
        *_settings(result, benchmark),
        *_base(result, standard),
        *(_sampling(result, preset) if "judge" in benchmark else ()),
        *_versions(result, benchmark),
        *_counts(result, benchmark),
    )


def _places(result: Result) -> list[str]:
    """What a result says its model is or comes from: hub ids, or last names of folders."""
    target = result.target or {}
    named = [target[key].get("name") for key in ("base", "model") if isinstance(target.get(key), Mapping)]
    return [place for place in (*named, target.get("name"), result.model) if isinstance(place, str)]


def _judge(result: Result, benchmark: Mapping[str, Any]) -> Iterator[str]:
    judge = benchmark.get("judge")
    if judge is not None and result.judge != judge:
        yield f"the judge is {result.judge or 'not known'}; the paper's is {judge}"


def _settings(result: Result, benchmark: Mapping[str, Any]) -> Iterator[str]:
    for key, value in benchmark.get("settings", {}).items():
        if (found := result.settings.get(key)) != value:
            yield f"{key} is {_said(found)}; the paper's is {_said(value)}"
    for key, value in benchmark.get("unlike", {}).items():
        if result.settings.get(key) == value:
            yield f"{key} is {value}; the paper's is the benchmark's"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _base(result: Result, standard: Standard) -> Iterator[str]:
    places = _places(result)
    found = next((place for place in places if place in standard.known), None)
    if found is None and result.target is None:
        yield "what the model was trained from is not known"
    elif found is None:
        yield f"another base: {places[0]}"
    elif "/" not in found:
        yield f"its base is a folder called {found}, taken to be the paper's"


def _sampling(result: Result, preset: str | None) -> Iterator[str]:
    """Keys that a result does not state (a server has its own defaults) count as differing."""
    if result.sampling is None:
        yield "how the answers were sampled is not known"
    elif preset is not None:
        standard = sampling_of(preset).as_dict()
        found = {key: result.sampling.get(key, "not stated") for key in DRAWN_BY}
        differing = [f"{key} {found[key]}, not {standard[key]}" for key in DRAWN_BY if found[key] != standard[key]]
        if differing:
            yield f"other sampling than {preset}'s: {'; '.join(differing)}"


def _versions(result: Result, benchmark: Mapping[str, Any]) -> Iterator[str]:
    for package, version in benchmark.get("versions", {}).items():
        found = result.versions.get(package)
        if found != version:
            yield f"{package} {found or 'of no stated version'}; the recipe asks for {version}"


def _counts(result: Result, benchmark: Mapping[str, Any]) -> Iterator[str]:
    for key, number in benchmark.get("counts", {}).items():
        if (found := result.counts.get(key)) != number:
            yield f"{key}: {_said(found)}, of {number} in the paper"
