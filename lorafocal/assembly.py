"""What `FocalPOTrainer` is given, checked and put together: policy, reference model, layout, pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from lorafocal.arguments import FocalPOConfig
from lorafocal.bounds import check_dropout
from lorafocal.budget import longest_alone, settle_budget
from lorafocal.caching import SpotCheck, context_of, spot_check
from lorafocal.compatibility import Cell, adapter_words, check, guide_refusal
from lorafocal.data.needs import check_like_training, check_needs
from lorafocal.data.packing import PairCollator
from lorafocal.data.sources import Preference, preferences_from_rows
from lorafocal.data.tokens import TokenizedData, TokenizedPair, tokenize_preferences
from lorafocal.data.turns import is_sound
from lorafocal.errors import InputError
from lorafocal.given import check_rows
from lorafocal.memory import Choice
from lorafocal.model.adapters import (
    add_frozen_copy,
    attach_lora,
    features,
    freeze,
    stands_beside,
    widen_adapters,
)
from lorafocal.model.base_config import of_layers
from lorafocal.model.beside import add_guide, add_strategy
from lorafocal.model.compiled import bucket_of, compile_layers, restore_layers
from lorafocal.model.fused import fuse, unfuse
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length, check_same_tokens, check_vocabulary, load_base, load_tokenizer
from lorafocal.model.master import arithmetic_of, has_masters
from lorafocal.model.noise import switch_noise_off
from lorafocal.model.quantized import quantization_of, settle
from lorafocal.model.starts import attaching, initialize, rewrites_base
from lorafocal.model.stored import check_as_stored
from lorafocal.model.trained_modules import embeddings_of
from lorafocal.objectives import OBJECTIVES, Entry
from lorafocal.ops.attention import SHARED_PREFIX_ATTENTION
from lorafocal.ops.attention_kernels import KernelChoice, all_of, choose
from lorafocal.ops.elementwise import load
from lorafocal.ops.logps import set_heads
from lorafocal.policy import plain_attention
from lorafocal.probes import LayoutChoice, choose_layout
from lorafocal.references.strategy import Strategy
from lorafocal.store import ReferenceStore
from lorafocal.tensor_files import dtype_word, tensors_sha256

logger = logging.getLogger(__name__)

Rows = Iterable[Any]


def opened(
    model: str | PreTrainedModel | PeftModel,
    ref_model: str | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase | None]:
    """The model, loaded in bfloat16 where it is a name, and its tokenizer; a named reference must share that.

    Raises InputError where these do not fit together, or an adapter has been merged into the model.
    """
    if isinstance(model, str):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_base(model, device=device)
    check_as_stored(model)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
        if isinstance(ref_model, str):
            check_same_tokens(tokenizer, load_tokenizer(ref_model), ref_model)
    return model, tokenizer


def assemble_policy(
    model: PreTrainedModel | PeftModel,
    peft_config: LoraConfig | None,
    args: FocalPOConfig,
    pairs: Sequence[TokenizedPair],
) -> PreTrainedModel | PeftModel:
    """The model as it is, to be trained in full, or with exactly one checked adapter, in fp32 and at its start.

    Dropout is off unless allowed. `pairs` are the tokenised training pairs, which the start "eva" is computed from.
    Raises InputError for what `lorafocal.compatibility` does not train.
    """
    settle(model)
    config = _only_adapter(model) if peft_config is None and isinstance(model, PeftModel) else peft_config
    check(cell_of(model, config, args))
    if config is not None and has_masters(model):
        raise InputError(
            "the model's weights are the fp32 masters of a run that trained all of them: to train an adapter on it,"
            " save it (`trainer.save_model()`) and load that folder"
        )
    policy: PreTrainedModel | PeftModel = model
    if config is None:
        _refuse_what_adapters_have(args)
    elif peft_config is None:
        policy = widen_adapters(model)
    else:
        check_dropout(config.lora_dropout, allowed=args.allow_dropout)
        set_seed(args.seed)  # the adapter's start depends on `seed` alone
        with attaching(model, config):
            policy = attach_lora(model, config)
        with plain_attention(policy):  # a base of an earlier run is prepared for packs
            initialize(policy, pairs, seed=args.seed)
    if isinstance(policy, PeftModel) and stands_beside(policy.active_adapter):
        raise InputError(
            f"the adapter is named {policy.active_adapter!r}, the name of a frozen copy: load it under another name"
        )
    if not args.allow_dropout and (count := switch_noise_off(policy)):
        logger.info("switched %d dropouts and jitters off: they would make policy and reference differ by noise", count)
    return policy


def _refuse_what_adapters_have(args: FocalPOConfig) -> None:
    """Raise InputError for settings that would be ignored where every weight is trained."""
    stray = {"loraplus_lr_ratio": args.loraplus_lr_ratio is not None, "adapter_kernels": args.adapter_kernels == "peft"}
    if named := [name for name, given in stray.items() if given]:
        raise InputError(
            f"{' and '.join(named)}: there is no adapter (and no `peft_config`), so every weight is trained and this"
            " would be ignored: leave it out"
        )


def cell_of(model: nn.Module, config: LoraConfig | None, args: FocalPOConfig) -> Cell:
    """Where a run stands in the table, read from what will be trained; layout "auto" counts as packed."""
    if config is not None and type(config) is not LoraConfig:
        raise InputError(f"the adapter is of kind {config.peft_type.value}, and LoRA adapters are trained here")
    return Cell(
        base=quantization_of(model) or dtype_word(arithmetic_of(model)),
        adapter=adapter_words(None) if config is None else features(config),
        reference=args.strategy.word,
        layout="packed" if args.layout == "auto" else args.layout,
        engine=str(args.engine),
    )


def _only_adapter(model: PeftModel) -> LoraConfig:
    """The configuration of the one adapter that a model brings. Raises InputError for several."""
    if len(model.peft_config) > 1:
        raise InputError(
            f"the model carries {len(model.peft_config)} adapters ({', '.join(model.peft_config)}), and one is"
            " trained: load it with that one alone, and merge what else it needs into its base first"
            " (`lorafocal merge`)"
        )
    config = next(iter(model.peft_config.values()))
    if rewrites_base(config.init_lora_weights) or config.init_lora_weights == "loftq":
        raise InputError(
            f"the adapter's start is {config.init_lora_weights!r}, for which PEFT has changed the base, so the saved"
            " adapter would not fit the base as it is stored: give the base and `peft_config`, or, to continue such an"
            " adapter, convert it by PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)` and"
            " load that"
        )
    return config


def assemble_ref_model(
    ref_model: str | PreTrainedModel | PeftModel,
    policy: PreTrainedModel | PeftModel,
    device: torch.device | None = None,
) -> PreTrainedModel | PeftModel:
    """The separate reference: frozen, dropout off, in evaluation mode for good.

    Raises InputError where it is the policy's own base, or speaks of another vocabulary.
    """
    model = load_base(ref_model, device=device) if isinstance(ref_model, str) else ref_model
    settle(model)
    base = causal_lm(model)
    if base is policy:
        raise InputError(
            "ref_model is the very model that is trained, so it would change with every step: give a second copy of it"
            ' (or its name), or store its log-probs first (`reference="cached"`)'
        )
    if base is causal_lm(policy):
        raise InputError(
            "ref_model is the policy's own base, with the policy's adapter in its layers: leave `ref_model` out and use"
            ' `reference="disabled_adapter"`, which is that base with the adapter off and costs no second model'
        )
    ours, theirs = (embeddings_of(m).weight.shape[0] for m in (causal_lm(policy), base))
    if ours != theirs:
        raise InputError(
            f"ref_model has {theirs} embeddings, the policy {ours}: they do not share a tokenizer, so the same token"
            " ids mean other text. Give a reference of the same family"
        )
    switch_noise_off(model)
    freeze(dict(model.named_parameters()))
    return model.eval()


def reference_identity(
    strategy: Strategy, policy: PreTrainedModel | PeftModel, ref_model: nn.Module | None
) -> dict[str, Any]:
    """What a resumed run must find again: kind, settings, and digests of what the reference is made of, and the guide.

    A copy of the adapter as it is now is made here, and finished adapters are put beside the policy's.
    """
    fixed: Mapping[str, torch.Tensor] = {} if ref_model is None else sample_of(ref_model)
    guide: Mapping[str, torch.Tensor] = {}
    if isinstance(policy, PeftModel):
        if strategy.kind in ("frozen_copy", "moving"):
            fixed = add_frozen_copy(policy)
        elif strategy.folders:
            fixed = add_strategy(policy, strategy)
        if strategy.guide is not None:
            guide = add_guide(policy, strategy.guide)
    elif strategy.guide is not None:
        raise InputError(f"reference.guide: {guide_refusal(adapter_words(None))}")
    return {
        "kind": strategy.kind,
        "sha256": tensors_sha256(fixed) if fixed else None,
        "settings": strategy.settings() or None,
        "guide": tensors_sha256(guide) if guide else None,
    }


def sample_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Up to 4096 entries of each tensor, spread over it: they tell models of one shape apart, and hash in a second."""
    flat = {name: parameter.detach().reshape(-1) for name, parameter in model.named_parameters()}
    return {name: values[:: 1 + values.numel() // 4096].contiguous() for name, values in flat.items()}


class Prepared(NamedTuple):
    """How a policy is computed."""

    budget: Choice
    layout: LayoutChoice
    bucket: int  # token rows that packed rows are multiples of
    words: dict[str, str]  # what of all this a reader should know


def prepare_layers(scorers: Sequence[PeftModel], args: FocalPOConfig, pairs: Sequence[TokenizedPair]) -> Prepared:
    """Fused functions, budget, layout and compilation of the policy, the first of `scorers`, on its device by now.

    A reference model, the second, gets the same layout. Raises InputError where something would be ignored.
    """
    policy = scorers[0]
    for model in scorers:  # what an earlier run may have left
        restore_layers(model)
        unfuse(model)
    budget, words = assemble_kernels(policy, args, pairs)
    layout = choose_common_layout(scorers, args.layout)
    for model in scorers:  # their heads are there by now
        set_heads(model, load(args.elementwise_kernels), budget.head_rows)
    if layout.reason and args.process_index == 0:
        logger.warning("training padded, each prompt twice: %s", layout.reason)
    most = max(budget.tokens, longest_alone(args, pairs))
    bucket, compiled = compile_packed(policy, args, layout.layout, most)
    words |= {"attention": str(attention_of(policy, args.device)), "compiled": compiled}
    return Prepared(budget, layout, bucket, words)


def assemble_kernels(
    policy: PeftModel, args: FocalPOConfig, pairs: Sequence[TokenizedPair]
) -> tuple[Choice, dict[str, str]]:
    """The fused functions that `args` allows and that are exact, the token budget and the tier; each also in words."""
    fused, adapters = None, isinstance(policy, PeftModel)
    if args.adapter_kernels == "auto" and adapters:
        fused = fuse(policy, args.elementwise_kernels)
    elif args.recompute == "mlp" or args.elementwise_kernels != "torch":
        stray = "recompute=mlp" if args.recompute == "mlp" else f"elementwise_kernels={args.elementwise_kernels}"
        raise InputError(
            f"{stray} is a matter of the fused adapter functions: "
            + ("set adapter_kernels=auto, or leave it out" if adapters else "without an adapter, leave it out")
        )
    choice = settle_budget(policy, args, args.device, pairs, fused=fused is not None and fused.mlps > 0)
    if choice.tier == "mlp":
        fused = fuse(policy, args.elementwise_kernels, "mlp")
    if choice.tier == "full":
        checkpoint_layers(args)
    return choice, {
        "adapters": str(fused) if fused is not None else "PEFT's own" if adapters else "none: every weight is trained",
        "recomputed": {"none": "nothing", "mlp": "gate and up", "full": "every layer"}[choice.tier],
        "packs": f"{choice.tokens} token rows, or one longer pair ({choice.reason})",
    }


def attention_of(policy: nn.Module, device: torch.device) -> KernelChoice:
    """What attends in `policy`, prepared for its layout: transformers' own where rows are padded."""
    config = causal_lm(policy).config.get_text_config()
    if config._attn_implementation != SHARED_PREFIX_ATTENTION:
        backend = getattr(causal_lm(policy), "backend", None)
        name = f"transformers' {config._attn_implementation}" if backend is None else f"{backend}'s own"
        return KernelChoice(name, None, "padded rows")
    sinks = any(name.endswith("sinks") for name, _ in policy.named_parameters())
    return all_of(
        choose(
            device,
            arithmetic_of(policy),
            window=getattr(layer, "sliding_window", None),
            softcap=getattr(layer, "attn_logit_softcapping", None),
            sinks=sinks,
            head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in of_layers(config)
    )


def compile_packed(policy: nn.Module, args: FocalPOConfig, layout: str, most: int) -> tuple[int, str]:
    """Compile the decoder layers where that is asked for and can be, for packs of up to `most` rows: the bucket of
    packed rows, and what was done."""
    if not args.compile_layers:
        return 1, "no"
    bucket = bucket_of(most)
    if layout != "packed":
        reason: str | None = "rows are padded"
    elif args.engine == "zero3":
        reason = "DeepSpeed's hooks, which fetch a layer's weights, would be compiled with it, again and again"
    else:
        reason = compile_layers(policy, bucket)
    return (bucket, f"decoder layers, for multiples of {bucket} token rows") if reason is None else (1, f"no: {reason}")


def checkpoint_layers(args: FocalPOConfig) -> None:
    """Have transformers compute every decoder layer again in the backward, as `recompute="full"` asks."""
    name = "activation" if hasattr(args, "activation_checkpointing") else "gradient"  # transformers before 5.20
    setattr(args, f"{name}_checkpointing", True)
    if getattr(args, f"{name}_checkpointing_kwargs") is None:
        setattr(args, f"{name}_checkpointing_kwargs", {"use_reentrant": False})


def choose_common_layout(models: Sequence[nn.Module], layout: str) -> LayoutChoice:
    """One layout for policy and reference: packed where all of them can, each prepared for it."""
    choices = [choose_layout(model, layout) for model in models]
    padded = next((choice for choice in choices if choice.layout == "padded"), None)
    if padded is None:
        return choices[0]
    for model, choice in zip(models, choices, strict=True):
        if choice.layout != padded.layout:
            choose_layout(model, padded.layout)
    return padded


@dataclass(slots=True)
class StoredReference:
    """The reference "cached": `model`, the policy at its start or a separate one, as far as a store speaks for it.

    A separate one may be let go (None) once its log-probs are looked up and checked. `per_token`: the objective weighs
    tokens, so the store has to have log-probs of each.
    """

    model: nn.Module | None
    store: ReferenceStore
    collator: PairCollator
    per_token: bool = False
    checked: SpotCheck | None = None

    @classmethod
    def of(cls, model: nn.Module, args: FocalPOConfig, collator: PairCollator) -> StoredReference:
        """Call it before the first step: the identity of `model` is read from its weights as they are."""
        kernels = f"{args.adapter_kernels} {load(args.elementwise_kernels).name}" + " compiled" * args.compile_layers
        kernels += " tf32" * bool(args.tf32)
        attention = attention_of(model, args.device).name
        context = context_of(model, layout=collator.layout, attention=attention, kernels=kernels)
        per_token = OBJECTIVES[args.objective].token_weights is not None
        return cls(model, ReferenceStore(str(args.reference_store), context), collator, per_token)

    def look_up(self, pairs: Sequence[TokenizedPair], *, seed: int) -> list[TokenizedPair]:
        """The pairs with their reference. At the first call, before any step, some are checked against a live pass.

        Raises InputError for what is missing, altered, foreign or further from a live pass than noise explains.
        """
        found = self.store.look_up(pairs, per_token=self.per_token)
        if self.checked is None and self.model is not None:
            self.checked = spot_check(self.model, found, collator=self.collator, seed=seed)
        return found

    @property
    def noise(self) -> float:
        """Largest difference of a live pass, in nats, that is none."""
        return 0.0 if self.checked is None else self.checked.tolerance


def tokenized(rows: Rows, name: str, tokenizer: PreTrainedTokenizerBase | None, args: FocalPOConfig) -> TokenizedData:
    """Preference rows, `Preference`s or already tokenised pairs, to pairs with what the objective asks for beside."""
    check_rows(rows, name)
    rows, entry = list(rows), OBJECTIVES[args.objective]
    ready = rows and all(isinstance(row, TokenizedPair) for row in rows)
    made = TokenizedData(rows, {}, {}) if ready else _from_rows(rows, name, tokenizer, args)
    if not entry.others:
        made.pairs = [replace(pair, others=()) if pair.others else pair for pair in made.pairs]
    check_needs(made.pairs, name, entry)
    return made


def _from_rows(
    rows: list[Any], name: str, tokenizer: PreTrainedTokenizerBase | None, args: FocalPOConfig
) -> TokenizedData:
    """Preference rows or `Preference`s to pairs; says what was dropped."""
    if tokenizer is None:
        raise InputError("processing_class is missing: give the base's tokenizer")
    preferences = (
        rows if rows and all(isinstance(row, Preference) for row in rows) else preferences_from_rows(rows, name).pairs
    )
    made = tokenize_preferences(
        preferences,
        tokenizer,
        max_length=args.max_length,
        truncation=args.truncation,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        others=OBJECTIVES[args.objective].others is not None,
    )
    for reason, count in made.drops.items():
        logger.warning("%s: %d pairs dropped: %s", name, count, reason)
    return made


def check_data(data: Mapping[str, TokenizedData], models: Sequence[nn.Module], entry: Entry) -> None:
    """`check_pairs` of each part, and that held-out pairs are of the training pairs' kinds. Raises InputError."""
    for name, part in data.items():
        check_pairs(part.pairs, name, models)
    if len(data) == 2:
        train, held_out = (data[name].pairs for name in ("train_dataset", "eval_dataset"))
        check_like_training(held_out, train, "eval_dataset", entry)


def check_pairs(pairs: Sequence[TokenizedPair], name: str, models: Sequence[nn.Module]) -> None:
    """Refuse pairs that one of the models could not score, or would without a word score as something else.

    Raises InputError: a part without tokens, ids beyond the embeddings, lengths that `check_length` refuses.
    """
    bases = [causal_lm(model) for model in models]
    rows = min(embeddings_of(base).weight.shape[0] for base in bases)
    for pair in pairs:
        others = [ids for other in pair.others for ids in (other.prompt_ids, other.completion_ids)]
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *others)
        if not all(parts):
            raise InputError(f"{name}: pair {pair.id!r} has a part without tokens: each needs at least one")
        if not (is_sound(pair.chosen_ids, pair.chosen_turns) and is_sound(pair.rejected_ids, pair.rejected_turns)):
            raise InputError(
                f"{name}: pair {pair.id!r} has turns that do not go with its tokens: each token has its turn, 0 first,"
                " then numbers that rise by one at most, -1 between turns for what is not scored"
            )
        if (highest := max(map(max, parts))) >= rows:
            raise InputError(
                f"{name}: pair {pair.id!r} has token id {highest}, but the model's embeddings end at {rows - 1}: it was"
                " tokenised for another model"
            )
    for base in bases:
        check_length(base, max((pair.longest for pair in pairs), default=0))
