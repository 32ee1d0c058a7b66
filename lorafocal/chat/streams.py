"""Answers token by token, several in turn on one model: each with a KV cache and random numbers of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafocal.model.head import causal_lm


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn: greedy at temperature 0, else from the whole distribution (no top-k, no top-p).

    An answer ends with one of the ids in `ends`, or after `max_new_tokens`.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    ends: frozenset[int]


class TokenStream:
    """One answer in the making; `step` adds a token to `ids`.

    The tokens are those of transformers' `generate` with the same temperature, `top_k=0` and `top_p=1`, after
    `torch.manual_seed(seed)`; the caller's random state is not touched.
    """

    def __init__(self, model: nn.Module, prompt_ids: Sequence[int], drawing: Drawing) -> None:
        self.ids: list[int] = []
        self._model: Any = causal_lm(model)
        self._drawing = drawing
        self._sequence = torch.tensor([list(prompt_ids)], device=self._model.device)
        self._cache: Any = None  # made by the model itself, in the kind that it needs
        self._random = torch.Generator(self._model.device).manual_seed(drawing.seed)
        accepts = inspect.signature(self._model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    @property
    def stopped(self) -> bool:
        """Whether the model has ended its answer."""
        return bool(self.ids) and self.ids[-1] in self._drawing.ends

    @property
    def done(self) -> bool:
        return self.stopped or len(self.ids) >= self._drawing.max_new_tokens

    @torch.no_grad()
    def step(self) -> None:
        """Draw the next token."""
        token = self._draw(self._next_logits())
        self.ids.append(int(token))
        self._sequence = torch.cat([self._sequence, token], dim=1)

    def _next_logits(self) -> Tensor:
        """(1, vocabulary) fp32. A model that keeps no such cache reads the whole sequence each time."""
        new = self._sequence if self._cache is None else self._sequence[:, -1:]
        output = self._model(
            input_ids=new, past_key_values=self._cache, use_cache=True, return_dict=True, **self._last_logits
        )
        self._cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].float()

    def _draw(self, logits: Tensor) -> Tensor:
        """(1, 1) int64."""
        if self._drawing.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probabilities = (logits / self._drawing.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self._random)


Turn = tuple[TokenStream, Callable[[], AbstractContextManager[Any]]]


def in_turn(turns: Sequence[Turn]) -> Iterator[None]:
    """One token of each stream that is not done, within the state of the model that belongs to it; then the next.

    Between two tokens the model is as the caller left it, so the iteration may be stopped anywhere.
    """
    while not all(stream.done for stream, _ in turns):
        for stream, state in turns:
            if not stream.done:
                with state():
                    stream.step()
                yield
