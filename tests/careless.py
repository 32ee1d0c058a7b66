"""What a careless author would have written where the guards of `tests/guards.py` stand.

Each function replaces one of the library's, of the same signature; the docstring says which trap it opens. Imported
by `tests/guards.py`, which must stay light: torch and the library are imported inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any


def bf16_adapters(model: Any) -> Any:
    """Row 13: adapters in the base's dtype."""
    import torch

    from lorafocal.model.adapters import adapter_parameters

    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def whatever_the_adapter_holds(model: Any) -> Any:
    """Row 3: the adapter's tensors, without a look at what else would be trained."""
    from lorafocal.model.adapters import adapter_parameters

    return adapter_parameters(model)


def stacked_adapter(model: Any, config: Any) -> Any:
    """Row 4: PEFT only warns when a second adapter is put on the first."""
    from peft import get_peft_model

    return get_peft_model(model, config)


def rates_of_peft(optimizer: Any, parameters: Any, ratio: float) -> None:
    """Row 32: as PEFT groups for LoRA+, vectors learn at B's rate and the weight decay that was asked for is gone."""
    rate = optimizer.param_groups[0]["lr"]
    fast = [p for name, p in parameters.items() if "lora_B" in name or p.ndim == 1]
    slow = [p for name, p in parameters.items() if not ("lora_B" in name or p.ndim == 1)]
    usual = optimizer.param_groups[0] | {"weight_decay": 0.0}
    optimizer.param_groups[:] = [usual | {"params": slow}, usual | {"params": fast, "lr": rate * ratio}]


def merged_into_the_base(base: Any, folder: Any) -> Any:
    """Row 44: the first stage is merged into the 4-bit weights, which are rounded a second time."""
    from peft import LoraConfig, PeftModel

    from lorafocal.model.adapters import attach_lora

    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    return attach_lora(merged, LoraConfig(r=4, lora_alpha=8))


def sums_of_a_pack_alone(comparison: Any, model: Any, packs: Any, pairs: int, number: int = 0) -> Any:
    """Row 15: what is a loss of the whole step is computed of each pack, so that its size changes the loss."""
    from lorafocal.comparison import Part, Step

    return Step(tuple(map(Part, packs)), pairs, comparison.state)


def packs_as_they_come(original: Any) -> Any:
    """F4: each rank runs the packs it has; one with fewer waits for, or runs into, the others' next exchange."""
    return lambda trainer, batch: (batch.packs, original(trainer, batch)[1])


def naive_factor(losses: Any, log_odds: Any, *, gamma: float) -> Any:
    """Row 11: the formula as it is printed; the sigmoid underflows, and its power has no finite slope there."""
    return log_odds.sigmoid() ** gamma * losses


def naive_eq3(losses: Any, log_odds: Any, *, gamma: float) -> Any:
    """Row 11: the paper's Eq. 3 as it is printed; for well ranked pairs it is infinity times nothing."""
    return (1 - log_odds.sigmoid()) ** -gamma * losses


def detached_factor(losses: Any, log_odds: Any, *, gamma: float) -> Any:
    """Row 64: the factor taken for a constant weight, which is another loss."""
    from torch.nn.functional import logsigmoid

    return (gamma * logsigmoid(log_odds)).exp().detach() * losses


def focalpo_with_epsilon(policy: Any, reference: Any, *, beta: float, gamma: float) -> Any:
    """Row 64: log 0 kept away by an epsilon, so that gamma = 0 is DPO only nearly."""
    from lorafocal.objectives.pairwise import implicit

    odds = implicit(policy, reference, beta=beta)
    p = odds.log_odds.sigmoid() + 1e-8
    return odds.with_losses(-(p**gamma) * p.log())


def left_padded(pairs: Sequence[Any], *, pad_token_id: int = 0) -> Any:
    """Row 19: padded on the left, as tokenizers for generation do, with positions counted from the padding on."""
    import torch

    from lorafocal.data.packing import Pack, _index

    sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    sequences = [[*pair.prompt_ids, *ids] for pair, ids in zip([*pairs, *pairs], sides, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (width - len(sequence)) + sequence for sequence in sequences])
    mask = torch.tensor([[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    rows = [[*range((row + 1) * width - len(side) - 1, (row + 1) * width - 1)] for row, side in enumerate(sides)]
    return Pack(
        ids,
        torch.arange(width).expand_as(ids).contiguous(),
        _index(rows, pairs),
        tuple(pair.id for pair in pairs),
        attention_mask=mask,
    )


def running_positions(original: Any) -> Any:
    """Row 19: positions that run on through the rejected answer and the next pair, as without position_ids."""

    def share_prefixes(pairs: Sequence[Any]) -> Any:
        import torch

        pack = original(pairs)
        return replace(pack, position_ids=torch.arange(pack.input_ids.numel())[None])

    return share_prefixes


def masks_from_ids(original: Any) -> Any:
    """Row 27: whatever equals the pad token is padding, for the attention and for the loss; an EOS with it."""

    def pad_sequences(pairs: Sequence[Any], *, pad_token_id: int = 0) -> Any:
        pack = original(pairs, pad_token_id=pad_token_id)
        index = pack.index
        kept = index.labels != pad_token_id
        index = replace(
            index,
            positions=index.positions[kept],
            labels=index.labels[kept],
            sequence=index.sequence[kept],
            lengths=index.sequence[kept].bincount(minlength=len(index.lengths)),
        )
        return replace(pack, index=index, attention_mask=(pack.input_ids != pad_token_id).long())

    return pad_sequences


def leaking_attention(query: Any, key: Any, value: Any, segments: Any, **options: Any) -> Any:
    """Row 20: naive packing, causal over the whole row."""
    from lorafocal.ops.attention import PairSpan, Segments, shared_prefix_attention_plain

    whole = Segments.of((PairSpan(0, 1, query.shape[2] - 1, 0),))
    return shared_prefix_attention_plain(query, key, value, whole, **options)


def divergences_of_whole_tables(hidden, weight, labels, reference, bias=None, transform=None, *, rows_per_chunk=None):  # type: ignore[no-untyped-def]
    """As a paper's own code has them: both models' log-probs of all rows and words at once."""
    from lorafocal.ops import divergences
    from lorafocal.ops.logps import LogitTransform, token_logps_plain

    transform = transform or LogitTransform()
    return divergences.ComparedTokens(
        token_logps_plain(hidden, weight, labels, bias, transform),
        divergences.token_divergences_plain(hidden, weight, reference, bias, transform),
        token_logps_plain(reference.hidden, reference.weight, labels, reference.bias, reference.transform).detach(),
    )


def any_head(model: Any) -> Any:
    """Row 21: the weight inside whatever the output head is, an adapter on it ignored."""
    from lorafocal.model.head import causal_lm
    from lorafocal.ops.logps import LogitTransform, LogProbHead

    head = causal_lm(model).get_output_embeddings()
    head = getattr(head, "base_layer", head)
    head.__class__ = LogProbHead
    head.labels = head.rows = None
    head.transform = LogitTransform()
    return head


def head_under_autocast(head: Any, hidden: Any) -> Any:
    """F13: the matrix product of the head rounds to bf16 where training runs under autocast."""
    from lorafocal.ops.logps import token_logps

    flat = hidden.reshape(-1, hidden.shape[-1])
    flat = flat if head.rows is None else flat[head.rows]
    return token_logps(flat, head.weight, head.labels, head.bias, head.transform, fold=head.fold)[None]


def every_row_through_the_head(head: Any, hidden: Any) -> Any:
    """Row 36: the logits of all rows first, then those that are wanted."""
    from torch.nn.functional import linear

    logps = linear(hidden, head.weight).float().log_softmax(-1).flatten(0, 1)
    logps = logps if head.rows is None else logps[head.rows]
    return logps.gather(-1, head.labels[:, None]).T


def no_transform(base: Any) -> Any:
    """F11: logits taken as the head makes them."""
    from lorafocal.ops.logps import LogitTransform

    return LogitTransform()


def encode_with_special_tokens(tokenizer: Any, texts: Any) -> dict[str, list[int]]:
    """Row 23: the tokenizer's default puts a BOS before every text, each completion among them."""
    return {text: tokenizer(text)["input_ids"] for text in texts}


def eos_after_everything(original: Any) -> Any:
    """Row 24: an EOS after what a template wrote too, which ends the turn by itself."""

    def chat_texts(*given: Any) -> Any:
        *_, renderer = given
        return replace(original(*given), ids_after=(renderer.tokenizer.eos_token_id,))

    return chat_texts


def key_of_the_rows(preferences: Any, tokenizer: Any, options: Any) -> str:
    """Row 31: the rows and the length; a changed template, tokenizer or rule is answered with the old tokens."""
    import hashlib

    rows = [(row.prompt, row.chosen, row.rejected, row.id, row.score_chosen) for row in preferences]
    return hashlib.sha256(repr((rows, options["max_length"])).encode()).hexdigest()


def all_rows_at_once(hidden: Any, weight: Any, labels: Any, bias: Any = None, *transform: Any, **_: Any) -> Any:
    """Row 36: one (N, V) log-softmax in fp32."""
    from lorafocal.ops.logps import token_logps_plain

    return token_logps_plain(hidden, weight, labels, bias, *transform)


def switched_by_peft(switch: Any, adapter: str) -> Any:
    """F17: PEFT's own switch, which freezes the policy's adapter and un-freezes the copy, and back."""
    from contextlib import contextmanager

    @contextmanager
    def switched() -> Any:
        for layer in switch._layers:
            layer.set_adapter(adapter)
        yield
        for layer in switch._layers:
            layer.set_adapter("default", inference_mode=True)

    return switched()


def copy_that_is_the_adapter_itself(original: Any) -> Any:
    """F17: the copy's tensors share their memory with the policy's, so they are trained along."""

    def add_frozen_copy(policy: Any) -> Any:
        copies = original(policy)
        own = dict(policy.named_parameters())
        for name, parameter in copies.items():
            parameter.data = own[name.replace(".reference.", ".default.")].data
        return copies

    return add_frozen_copy


def every_adapter_saved(policy: Any, folder: Any, *_: Any, **__: Any) -> None:
    """Row 8: PEFT saves every adapter that the model carries."""
    policy.save_pretrained(folder)


def mean_of_means(metrics: Any, values: Any) -> None:
    """Row 16: batches weigh the same, however many pairs they hold; an empty one gives NaN."""
    mean = values.mean(0)
    metrics._sums = mean if metrics._sums is None else metrics._sums + mean
    metrics.num_pairs += 1


def correlation_of_rounding(count: float, x: float, xx: float, y: float, yy: float, xy: float) -> float:
    """Row 16: what rounding leaves of no variance is taken for some."""
    product = abs((xx - x * x / count) * (yy - y * y / count))
    return (xy - x * y / count) / max(product, 1e-300) ** 0.5


def table_that_keeps_logits(original: Any) -> Any:
    """Row 38: what evaluation computed is kept until its end, as loops that gather predictions do."""

    def add(table: Any, places: Any, policy: Any, reference: Any) -> None:
        table.kept = [*getattr(table, "kept", []), policy.chosen.new_zeros(len(places), 10, 97)]
        original(table, places, policy, reference)

    return add


def all_pairs(preferences: Any, *_: Any, **__: Any) -> Any:
    """Row 30: rows taken as they come."""
    return preferences


def pairs_cut_alone(truncate: Any) -> Any:
    """Row 28: a rule of length that forgets what goes with a pair."""

    def cut(pair: Any, truncation: str, limits: Any) -> Any:
        kept = truncate(replace(pair, others=()), truncation, limits)
        return kept and replace(kept, others=pair.others)

    return cut


def split_between_pairs(preferences: Any, size: Any, *, seed: int) -> Any:
    """Row 30: the last pairs held out, whatever else their prompts are in."""
    from lorafocal.data.mixture import held_out_pairs

    cut = len(preferences.pairs) - held_out_pairs(size, len(preferences.pairs))
    train, held_out = preferences.pairs[:cut], preferences.pairs[cut:]
    return replace(preferences, pairs=train), replace(preferences, pairs=held_out, bad_rows=[])


@contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """Row 14: the model is scored in whatever mode it is in."""
    yield


def any_revision(pattern: Any) -> Any:
    """Row S5: a branch or a tag is a revision, too."""
    return type("AnyText", (), {"fullmatch": staticmethod(lambda text: text)})


def whole_lines(file: Any) -> Any:
    """Row S17: a file's lines, however long."""
    return enumerate(file, start=1)


def unproven_layout(model: Any, layout: str) -> Any:
    """F12: every model is taken to call the attention that was registered."""
    from lorafocal.policy import prepare_policy
    from lorafocal.probes import LayoutChoice

    layout = "packed" if layout == "auto" else layout
    prepare_policy(model, layout=layout)
    return LayoutChoice(layout)


def adapter_as_it_is(policy: Any, values: Any = None) -> Any:
    """Row 6: a PiSSA adapter saved as it was trained, for a base that others do not have."""
    from dataclasses import replace

    return replace(policy.peft_config[policy.active_adapter], init_lora_weights=True), values


def copy_that_starts_again(original: Any) -> Any:
    """Row 6: PEFT adds the frozen copy with its own start, which takes PiSSA's part out of the base once more."""

    def add(policy: Any) -> Any:
        from copy import deepcopy

        policy.add_adapter("again", deepcopy(policy.peft_config[policy.active_adapter]))
        policy.delete_adapter("again")
        return original(policy)

    return add


def the_usual_cell(model: Any, config: Any, args: Any) -> Any:
    """Row 6: whatever is asked for is taken for plain LoRA on a float base."""
    from lorafocal.compatibility import Cell

    return Cell("float32", frozenset({"lora"}), args.reference or "none")


def missing_is_zero(store: Any, pairs: Any, there: Any) -> Any:
    """Row 35: what the store lacks is 0.0, as where a filtered data set meets a file of another one."""
    from lorafocal.store import answers_of

    found = [there.get(answer.key, 0.0) for answer in answers_of(pairs)]
    return list(zip(found[::2], found[1::2], strict=True))


def parts_as_they_are(folder: Any) -> Any:
    """Row 35: files read without a look at their digest."""
    from safetensors.torch import load

    return (load(path.read_bytes()) for path in sorted(folder.glob("part-*.safetensors")))


def named_by_configuration(context: Any) -> str:
    """Row 35: the key of a cache is the model's configuration, whatever its weights are held as."""
    import hashlib

    return hashlib.sha256(context.model_sha256.encode()).hexdigest()


def shapes_of_the_weights(original: Any) -> Any:
    """Row 35: a fingerprint of names and shapes, which all models of a family share."""

    def tensor_sha256(tensor: Any) -> str:
        import torch

        return original(torch.zeros(tensor.shape))

    return tensor_sha256


def no_spot_check(model: Any, pairs: Any, **_: Any) -> Any:
    """Row 35: what the store says is believed."""
    from lorafocal.caching import SpotCheck

    return SpotCheck(0, len(pairs), 0.0, 0.0, float("inf"), "float32")


def live_although_stored(kind: Any, model: Any, ref_model: Any = None, *_: Any) -> Any:
    """Row 34: log-probs are computed beforehand, and again in every step."""
    from lorafocal.reference import DisabledAdapterReference, SeparateModelReference

    return DisabledAdapterReference(model) if ref_model is None else SeparateModelReference(ref_model)


def whatever_was_computed(store: Any, scores: Any) -> Any:
    """Row 35: NaN is kept like a number."""
    from hashlib import sha256

    from safetensors.torch import save

    from lorafocal.publish import write_atomically
    from lorafocal.store import _tensors

    content = save(_tensors(scores, store.context))
    store.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(store.folder / f"part-{sha256(content).hexdigest()}.safetensors", content)


def index_at_its_word(name: str, revision: str | None) -> list[str]:
    """S9: transformers opens whatever a weight index names, wherever it lies."""
    import json
    from pathlib import Path

    index = Path(name) / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(map(str, json.loads(index.read_text())["weight_map"].values()))


@contextmanager
def changed_for_good(*owners: Any) -> Iterator[dict[Any, dict[str, Any]]]:
    """Row 61: whatever a library does to the classes of another stays, in every model of the process."""
    yield {owner: dict(vars(owner)) for owner in owners}
