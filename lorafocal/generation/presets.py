"""How answers are drawn: one value object, and the settings that published numbers were made with, as data.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorafocal.errors import InputError

BATCH_TOKENS = 65_536  # of prompts and answers, padding included: 8 GiB of keys and values of Llama 3 8B in bfloat16
COLDEST, HOTTEST = 1e-4, 1e4  # of temperatures; logits over far less overflow, and over far more are all alike


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer's tokens are drawn.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 are the whole distribution. An answer ends with the model's own
    end, or after `max_new_tokens`. `system` is a message put before every prompt: None for none, and an empty one is a
    message too.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is 1 or more, not {self.max_new_tokens}")
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise InputError(f"temperature is 0 (greedy) or from {COLDEST:g} to {HOTTEST:g}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is above 0 and at most 1 (the whole distribution), not {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k is 0 (the whole distribution) or a number of tokens, not {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is a whole number from 0 to 2^63, not {self.seed}")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise InputError("top_p and top_k choose among tokens that are drawn, and at temperature 0 none is: leave"
                             " them out, or give a temperature")  # fmt: skip

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Preset:
    """A named sampling, where its values are published, and what was done there beside it."""

    sampling: Sampling
    source: str
    note: str = ""


_SIMPO = "princeton-nlp/SimPO 1b3e8f3, eval"
PRESETS: Mapping[str, Preset] = {
    "llama3-alpaca": Preset(
        Sampling(temperature=0.9, max_new_tokens=4096),
        f"{_SIMPO}/alpacaeval2/configs/Llama-3-Instruct-8B-SimPO.yaml",
        "SimPO: with vLLM in bfloat16, top_p 1, ended by 128001 and 128009: Llama 3's ends of a text and of a turn",
    ),
    "mistral-base-alpaca": Preset(
        Sampling(temperature=0.7, max_new_tokens=2048, system=""),
        f"{_SIMPO}/alpacaeval2/configs/Mistral-7B-Base-SFT-SimPO.yaml and templates/mistral_base.txt",
        "SimPO: with vLLM in bfloat16, top_p 1; its template has an empty system message before the question",
    ),
    "arena-hard": Preset(
        Sampling(temperature=0.0, max_new_tokens=4096),
        f"{_SIMPO}/arenahard/configs/*/gen_answer_config.yaml",
        "SimPO: greedy as well, through a server of vLLM's",
    ),
    "greedy": Preset(Sampling(temperature=0.0, max_new_tokens=1024), "lorafocal: the most likely token at each step"),
}


def sampling_of(preset: str, **changed: Any) -> Sampling:
    """A preset's sampling, with those of `changed` that are not None in its place. Raises InputError."""
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; known: {', '.join(PRESETS)}")
    return replace(PRESETS[preset].sampling, **{key: value for key, value in changed.items() if value is not None})
