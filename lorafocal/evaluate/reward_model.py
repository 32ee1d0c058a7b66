"""A reward model of transformers: a sequence classifier with one output, and the rewards it gives to answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorafocal.data.encoding import encode
from lorafocal.data.messages import Messages
from lorafocal.data.templates import Fault, Renderer
from lorafocal.data.tokens import REMEDIES
from lorafocal.errors import InputError, first_line, ran_out
from lorafocal.generation.batches import plan_batches
from lorafocal.model.load import DTYPES, check_place, load_tokenizer, local_device, weight_names
from lorafocal.model.saved import stored_dtype
from lorafocal.publish import public_name

TOKENS_PER_BATCH = 16_384  # padding included
UNBOUNDED = 10**9  # above this, a tokenizer's longest text is a way of saying that it knows none
Encoded = Mapping[str, list[int]]  # input_ids, and token_type_ids where the tokenizer tells two texts apart


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A loaded reward model.

    `templated`: prompt and answer are a conversation in the tokenizer's chat template. Otherwise they are two texts
    with what the tokenizer puts around and between them. `limit` is the most tokens it takes, None for no limit.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    templated: bool
    limit: int | None

    @property
    def form(self) -> str:
        """How prompt and answer are put together, for a person."""
        return "by its chat template" if self.templated else "as a pair of texts"

    def rewards(
        self, answered: Sequence[tuple[str | Messages, str]], *, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> list[float | None]:
        """The reward of each (prompt, answer), in order; None where the two are longer than `limit`.

        A reward does not depend on what else is in its batch, beyond the rounding of the arithmetic. Raises InputError
        for a conversation that the template refuses and for rewards that are not finite.
        """
        rows = [self._encoded(prompt, answer) for prompt, answer in answered]
        fitting = [n for n, row in enumerate(rows) if self.limit is None or len(row["input_ids"]) <= self.limit]
        found: list[float | None] = [None] * len(rows)
        with _padding(self.model, [rows[n] for n in fitting]) as padding:
            budget = 1 if padding is None else tokens_per_batch  # 1: every row by itself
            for batch in plan_batches([len(rows[n]["input_ids"]) for n in fitting], 0, budget):
                places = [fitting[place] for place in batch]
                for place, reward in zip(places, self._forward([rows[n] for n in places], padding), strict=True):
                    found[place] = reward
        return found

    def _encoded(self, prompt: str | Messages, answer: str) -> Encoded:
        if not self.templated:
            if not isinstance(prompt, str):
                raise InputError(f"{self.name} has no chat template, so it reads a prompt as one text: give it that")
            return {key: ids for key, ids in self.tokenizer(prompt, answer).items() if key != "attention_mask"}
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        [text] = Renderer(self.tokenizer).render([[*asked, {"role": "assistant", "content": answer}]])
        if isinstance(text, Fault):
            raise InputError(f"{self.name} cannot be told this: {REMEDIES[text.reason]} ({text.detail})")
        return {"input_ids": encode(self.tokenizer, [text])[text]}

    def _forward(self, rows: Sequence[Encoded], padding: int | None) -> list[float]:
        device = self.model.device
        inputs = {
            key: pad_right([row[key] for row in rows], (padding or 0) if key == "input_ids" else 0).to(device)
            for key in rows[0]
        }
        inputs["attention_mask"] = pad_right([[1] * len(row["input_ids"]) for row in rows], 0).to(device)
        with torch.no_grad():
            rewards = self.model(**inputs).logits[:, 0].float()
        if not bool(rewards.isfinite().all()):
            raise InputError(f"{self.name} gives rewards that are not finite in {self.dtype}: use another dtype")
        return rewards.tolist()


def open_reward_model(name: str, *, dtype: str | None = None, device: torch.device | None = None) -> RewardModel:
    """Load a reward model, a folder or a hub id, in `dtype` (default: bfloat16 where stored so, else float32).

    It goes to `device`, or to the local one.

    Raises InputError, before weights are loaded where that can be known: one that is missing, pickled, needs code of
    its own, is no sequence classifier, or has another number of outputs than one.
    """
    check_place(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"no reward model can be read from {name} ({first_line(error)})") from error
    _check_kind(config, name)
    weight_names(name, None)
    dtype = dtype or stored_dtype(config)
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not supported; choose {' or '.join(DTYPES)}")
    tokenizer = load_tokenizer(name, key="the reward model")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            device_map={"": device or local_device()},
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise InputError(f"the reward model {name} cannot be loaded ({first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{name} lacks {len(missing)} tensors of a reward model (first: {missing[0]}), which would be random"
            " numbers: it is a model of another kind, or needs code of its own, which is not run"
        )
    shown = public_name(name)
    templated = bool(tokenizer.chat_template)
    return RewardModel(shown, model.eval(), tokenizer, dtype, templated, _limit(config, tokenizer))


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest) int64, every row from the left edge."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _check_kind(config: PreTrainedConfig, name: str) -> None:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"{name} is of the type {config.model_type!r}, of which transformers knows no reward models")
    if config.num_labels != 1:
        raise InputError(
            f"{name} has {config.num_labels} outputs; a reward model is a sequence classifier with one (num_labels 1)"
        )


def _limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that the model has positions for and the tokenizer allows."""
    stated = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    known = [length for length in stated if length is not None and 0 < length < UNBOUNDED]
    return min(known, default=None)


@contextmanager
def _padding(model: PreTrainedModel, rows: Sequence[Encoded]) -> Iterator[int | None]:
    """The model's padding; where it has none, an id that no row holds, which is it for the time being, if there is one.

    Causal classifiers read the last token that is not padding: an id that ends an answer must not be taken for it.
    """
    config = model.config.get_text_config()
    own = config.pad_token_id
    if own is None:
        held = {token for row in rows for token in row["input_ids"]}
        config.pad_token_id = next((token for token in range(config.vocab_size) if token not in held), None)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own
