"""Answers by vLLM, where it is installed: an adapter goes through its LoRA requests, on the base as it is stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from lorafocal.errors import InputError
from lorafocal.generation.asks import Ask, Completion, Key
from lorafocal.generation.batches import completion
from lorafocal.generation.local import SubjectEngine
from lorafocal.generation.subject import Subject
from lorafocal.model.quantized import prequantized
from lorafocal.model.saved import read_config
from lorafocal.model.serving import VLLM_RANKS, serving_notes

# Not one of its own where CUDA is not initialised, unless somebody says otherwise: vLLM would fork, and there CUDA does
# not start, since this process, and libraries that it imports, have asked whether there is a GPU.
OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
ROOM = 16_384  # tokens of a conversation that there is memory for, at least
CHUNK = 256  # answers that a kill loses at most; vLLM batches them as it likes


def hindrance(subject: Subject) -> str | None:
    """Why vLLM does not answer for this target on this machine; None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if not torch.cuda.is_available():
        return "vLLM needs a GPU"
    saved = subject.saved
    if saved is None:
        return None
    if saved.quantization is not None and prequantized(read_config(saved.base, saved.revision), saved.base) is None:
        return f"vLLM does not hold a base in {saved.quantization} as training did"
    unread = [note for note in serving_notes(saved.config) if "vLLM" in note and "--max-lora-rank" not in note]
    return unread[0].removesuffix(".") if unread else None


class VllmEngine(SubjectEngine):
    """A `Subject` by `vllm.LLM` (`asks.Engine`).

    A request's seed is a function of the sampling's and the ask's key, but vLLM's draws depend on its own batches too:
    of what is drawn, no bits are promised.
    """

    name = "vllm"

    def plan(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        """In the order of the prompts."""
        self.say(asks)
        return [list(asks[start : start + CHUNK]) for start in range(0, len(asks), CHUNK)]

    def answer(self, batch: Sequence[Ask]) -> list[Completion]:
        """One call of `LLM.generate`. Raises InputError for conversations that have grown out of the room."""
        model = self._model
        longest = max(len(self.ids[ask.key]) for ask in batch) + self.sampling.max_new_tokens
        if self._room is not None and self._room < longest <= (self._positions or 0):
            raise InputError(
                f"a conversation of several turns needs {longest} tokens, and vLLM has room for {self._room} until it"
                " is started anew: give the same command again, in a new process. It goes on from the answers that are"
                " there"
            )
        outputs = model.generate(
            [{"prompt_token_ids": self.ids[ask.key]} for ask in batch],
            [self._parameters(ask) for ask in batch],
            lora_request=self._adapter,
        )
        tokenizer = self.subject.tokenizer
        return [completion(output.outputs[0].token_ids, tokenizer, self.ends) for output in outputs]

    def _parameters(self, ask: Ask) -> Any:
        from vllm import SamplingParams

        sampling = self.sampling
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=None if sampling.greedy else request_seed(sampling.seed, ask.key),
            stop_token_ids=sorted(self.ends),
            detokenize=False,
        )

    @cached_property
    def _model(self) -> Any:
        if not torch.cuda.is_initialized():
            os.environ.setdefault(OWN_PROCESS, "0")
        from vllm import LLM

        saved = self.subject.saved
        lora = {} if saved is None else {"enable_lora": True, "max_lora_rank": _rank_limit(saved.config)}
        return LLM(
            model=self.subject.place,
            revision=self.subject.revision,
            dtype=self.subject.dtype,
            max_model_len=self._room,
            generation_config="vllm",  # nothing of the model's own: all is said in the parameters
            trust_remote_code=False,
            **lora,
        )

    @cached_property
    def _room(self) -> int | None:
        """Tokens that the longest conversation of the first turn asked for may grow to, as vLLM is started with them:
        it does not start on a card that has no memory for one of all positions, be they 131,072."""
        longest = max(map(len, self.ids.values())) + self.sampling.max_new_tokens
        return None if self._positions is None else min(self._positions, max(ROOM, 4 * longest))

    @cached_property
    def _adapter(self) -> Any:
        saved = self.subject.saved
        if saved is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.subject.name, 1, str(saved.folder))


def request_seed(seed: int, key: Key) -> int:
    """A seed of a request, in the range that vLLM takes."""
    return (seed + 1_000_003 * (key[0] + 1_000_003 * key[-1])) % 2**63


def _rank_limit(config: Any) -> int:
    """The least limit that vLLM takes for an adapter's rank. Raises InputError where there is none."""
    rank = max([config.r, *config.rank_pattern.values()])
    limit = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if limit is None:
        raise InputError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: merge it first")
    return limit
