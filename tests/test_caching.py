"""What identifies a reference, what it answers in large packs, how a killed call goes on, and spot checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from lorafocal import caching
from lorafocal.arguments import FocalPOConfig
from lorafocal.assembly import StoredReference
from lorafocal.caching import cache_reference, context_of, fingerprint, score, spot_check
from lorafocal.data.packing import PairCollator, share_prefixes
from lorafocal.data.tokens import OtherAnswer, TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.load import load_base
from lorafocal.policy import prepare_policy, sequence_logps, sums_of, token_logps
from lorafocal.store import ReferenceStore, answers_of
from tests.killing import moments
from tests.no_memory import NO_MEMORY, whoever_says_it
from tests.tiny import disturb, lora, pairs, tiny_base, tiny_policy

pytestmark = pytest.mark.slow

WORDS = {"layout": "packed", "attention": "sdpa", "kernels": "torch"}
FP32 = 2.0**-24  # what rounding to fp32 changes at most, relative


def prepared(kind: str = "llama", dtype: torch.dtype = torch.float32, *, layout: str = "packed", trained: bool = True):
    model = tiny_policy(kind, dtype, trained=trained)
    prepare_policy(model, layout=layout)
    return model


def store_of(folder: Path, model) -> ReferenceStore:
    return ReferenceStore(folder, context_of(model, **WORDS))


def stored(folder: Path, model, of: list[TokenizedPair], **settings) -> list[TokenizedPair]:
    store = store_of(folder, model)
    cache_reference(model, of, store, collator=PairCollator(**settings))
    return store.look_up(of)


def values(of: list[TokenizedPair]) -> Tensor:
    return torch.tensor([logps for pair in of for logps in pair.reference or ()], dtype=torch.float64)


def one_at_a_time(model, of: list[TokenizedPair]) -> Tensor:
    """Live log-probs, each pair in a pack of its own."""
    with torch.no_grad():
        return torch.stack([torch.cat(sequence_logps(model, share_prefixes([pair]))) for pair in of]).flatten().double()


# ---- identity


@pytest.mark.row("35")
@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 8, "lora_alpha": 1}, {"target_modules": ["q_proj"]}, {"use_rslora": True}],
    ids=str,
)
def test_an_adapter_that_changes_nothing_leaves_the_bases_fingerprint(settings):
    torch.manual_seed(len(settings))
    policy = attach_lora(tiny_base(), lora(**settings))
    assert fingerprint(policy) == fingerprint(tiny_base())
    assert context_of(policy, **WORDS) == context_of(tiny_base(), **WORDS)
    prepare_policy(policy)
    assert context_of(policy, **WORDS) == context_of(tiny_base(), **WORDS)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=str
)
def test_seeds_share_what_other_adapters_start_from(settings):
    found = set()
    for seed in (1, 2):
        base = tiny_base()
        torch.manual_seed(seed)
        found.add(fingerprint(attach_lora(base, lora(**settings))))
    assert len(found) == 1


@pytest.mark.row("35")
def test_every_tensor_of_the_base_counts():
    base = tiny_base()
    seen = {fingerprint(base)}
    for tensor in base.state_dict().values():
        before = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] = torch.nextafter(before, torch.tensor(torch.inf))
        seen.add(fingerprint(base))
        tensor.view(-1)[-1] = before
    assert len(seen) == 1 + len(base.state_dict())
    assert fingerprint(tiny_base(dtype=torch.bfloat16)) not in seen


def test_a_continued_adapter_counts_with_its_scaling():
    policy = tiny_policy()
    seen = {fingerprint(tiny_base()), fingerprint(policy), fingerprint(disturb(tiny_policy(), scale=0.3))}
    for layer in policy.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 2
    seen.add(fingerprint(policy))
    assert len(seen) == 4


def test_a_configuration_counts_where_it_changes_the_answer():
    base = context_of(tiny_base(), **WORDS)
    assert context_of(tiny_base(rope_theta=500.0), **WORDS).differences(base.as_dict())[0].startswith("model_sha256")
    assert context_of(tiny_base(use_cache=False), **WORDS) == base


def test_the_size_of_the_hashed_pieces_changes_nothing(monkeypatch):
    whole = fingerprint(tiny_base())
    monkeypatch.setattr(caching, "CHUNK_BYTES", 100)
    assert fingerprint(tiny_base()) == whole


@pytest.mark.row("35")
def test_bases_in_few_bits_are_contexts_of_their_own(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    found = {}
    for word in ("nf4", "nf4-double", "int8", None):
        base = load_base(str(tmp_path / "base"), dtype="float32", quantization=word)
        policy = attach_lora(base, lora())
        prepare_policy(policy)
        before = context_of(policy, **WORDS)
        stored(tmp_path / f"store of {word}", policy, pairs(4))
        assert context_of(policy, **WORDS) == before  # what bitsandbytes keeps of a pass is no part of it
        found[word] = before
    assert len({context.weights_sha256 for context in found.values()}) == 4
    assert [context.quantization for context in found.values()] == list(found)
    others = store_of(tmp_path / "store of nf4", tiny_base(dtype=torch.bfloat16))
    with pytest.raises(InputError, match="quantization is nf4 there and None here"):
        others.look_up(pairs(4))


# ---- log-probs


@pytest.mark.row("35")
def test_products_in_tf32_are_another_context(tmp_path):
    model, args = (
        prepared(),
        FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, reference="cached", reference_store="s"),
    )
    plain = StoredReference.of(model, args, PairCollator()).store.context
    args.tf32 = True  # refused at its start where no GPU has it
    assert StoredReference.of(model, args, PairCollator()).store.context.differences(plain.as_dict()) == [
        "kernels is auto torch there and auto torch tf32 here"
    ]


@pytest.mark.row("35")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"tokens_per_pack": 40}, {"layout": "padded"}, {"bucket": 16}], ids=str)
def test_what_is_stored_is_the_models_own_answer_rounded_to_fp32(tmp_path, kind, settings):
    """A float64 model: its answers differ by 1e-12 however they are packed, the stored ones by fp32's rounding."""
    layout = {key: value for key, value in settings.items() if key == "layout"}
    of, model = pairs(12), prepared(kind, torch.float64, **layout)
    found = values(stored(tmp_path, model, of, **settings))
    prepare_policy(model)
    exact = one_at_a_time(model, of)
    assert bool(((found - exact).abs() <= FP32 * exact.abs() + 1e-12).all())
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_a_live_answer_to_the_noise(tmp_path, dtype):
    of, model = pairs(12, longest=40), prepared(dtype=dtype)
    found = stored(tmp_path, model, of)
    check = spot_check(model, found, collator=PairCollator(tokens_per_pack=60), seed=0, count=12)
    gaps = (values(found) - one_at_a_time(model, of)).abs()
    assert float(gaps.max()) <= check.tolerance < (2e-4 if dtype == torch.float32 else 0.25)


def watched_scores(monkeypatch: pytest.MonkeyPatch, note: Callable[[int], object]) -> None:
    """`note` gets the number of answers of every call."""

    def watched(model, rows, collator):
        note(sum(map(len, rows)))
        return score(model, rows, collator)

    monkeypatch.setattr(caching, "score", watched)


@pytest.mark.row("35")
def test_each_distinct_answer_is_computed_once(tmp_path, monkeypatch):
    computed: list[int] = []
    watched_scores(monkeypatch, computed.append)
    a, b, c, d = [5, 9], [6, 7], [8], [4]
    of = [TokenizedPair(str(n), [1, 2], *two) for n, two in enumerate([(a, b), (a, c), (b, c), (b, a), (a, b)])]
    of.append(TokenizedPair("other prompt", [1, 3], a, d))
    model = prepared()
    found = stored(tmp_path, model, of)
    assert sum(computed) == 5
    assert torch.allclose(values(found), one_at_a_time(model, of), rtol=0, atol=1e-4)
    more = [*of, TokenizedPair("more", [1, 2], d, a)]
    assert len(stored(tmp_path, model, more)) == 7
    assert sum(computed) == 6


def test_a_second_call_computes_nothing_and_says_so(tmp_path, monkeypatch):
    of, model = pairs(9), prepared()
    store = store_of(tmp_path, model)
    first = cache_reference(model, of, store, collator=PairCollator())
    computed: list[int] = []
    watched_scores(monkeypatch, computed.append)
    second = cache_reference(model, [*of, *of], store, collator=PairCollator())
    assert (first.computed, first.found, second.computed, second.found) == (18, 0, 0, 18)
    assert computed == []
    assert "0 answers computed" in str(second)
    assert second.as_dict()["found"] == 18


def test_the_tokens_own_log_probs_sum_up(tmp_path):
    of, model = pairs(9), prepared()
    store = store_of(tmp_path, model)
    cache_reference(model, of, store, collator=PairCollator())
    again = cache_reference(model, of, store, collator=PairCollator(), per_token=True)
    assert again.computed == 18
    sums = [float(tokens.double().sum()) for two in store.token_logps(of) for tokens in two]
    assert sums == pytest.approx(values(store.look_up(of)).tolist(), rel=1e-6)


def test_scored_tokens_alone_and_further_answers_are_computed_as_a_pack_has_them(tmp_path):
    plain, model = pairs(6), prepared()
    longer = [*plain[2].prompt_ids, 9, 8]
    others = (OtherAnswer(plain[2].prompt_ids, [4, 5]), OtherAnswer(longer, [6]))
    several = replace(plain[4], chosen_ids=[2, 3, 4, 5], chosen_turns=[0, -1, -1, 1])
    of = [*plain[:2], replace(plain[2], others=others), plain[3], several, plain[5]]
    found = stored(tmp_path, model, of)
    [pack] = PairCollator(tokens_per_pack=1000, others=True)(of).packs
    with torch.no_grad():
        live = sums_of(token_logps(model, pack), pack).double()
    sides = zip(*(pair.reference for pair in found), strict=True)
    sums = [*chain(*sides), *(other.reference for pair in found for other in pair.others)]
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), live, rtol=1e-5, atol=1e-5)
    assert spot_check(model, found, collator=PairCollator(others=True), seed=0).pairs == 6
    first, second = found[2].others
    spoilt = replace(found[2], others=(first, replace(second, reference=second.reference + 1)))
    with pytest.raises(InputError, match="the stored log-prob of further answer 2 of pair 'pair-2'"):
        spot_check(model, [*found[:2], spoilt, *found[3:]], collator=PairCollator(), seed=0)


def test_dropout_is_off_and_every_module_keeps_its_mode(tmp_path):
    model = attach_lora(tiny_base(attention_dropout=0.0), lora(lora_dropout=0.5))
    prepare_policy(disturb(model))
    model.train()
    found = values(stored(tmp_path, model, pairs(5)))
    assert model.training
    model.eval()
    assert torch.allclose(found, one_at_a_time(model, pairs(5)), rtol=0, atol=1e-4)


@pytest.mark.row("35")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_model_stores_nothing(tmp_path, dtype):
    model = prepared(dtype=dtype)
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="answer of pair 'pair-0' a log-prob of nan"):
        stored(tmp_path, model, pairs(5))
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_written_costs_no_pass(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    watched_scores(monkeypatch, lambda count: pytest.fail("computed"))
    with pytest.raises(InputError, match="cannot be written"):
        stored(tmp_path / "file", prepared(), pairs(2))


def short_of_memory(monkeypatch, most: int, error: RuntimeError = NO_MEMORY[0]) -> list[int]:
    """Packs of more than `most` token rows fail as on a GPU; the rows of those that were tried."""
    tried: list[int] = []

    def limited(model, pack, *given):
        tried.append(pack.num_rows)
        if pack.num_rows > most:
            raise error
        return token_logps(model, pack, *given)

    monkeypatch.setattr(caching, "token_logps", limited)
    return tried


@pytest.mark.row("35 37")
@whoever_says_it
def test_packs_that_are_too_large_for_the_memory_are_halved_and_the_answers_stay(tmp_path, monkeypatch, caplog, error):
    of, model = pairs(20), prepared()
    expected = values(stored(tmp_path / "whole", model, of))
    longest = max(map(PairCollator().rows_alone, of))
    tried = short_of_memory(monkeypatch, 2 * longest, error)
    found = values(stored(tmp_path / "halved", model, of, tokens_per_pack=16 * longest))
    assert torch.allclose(found, expected, rtol=1e-6)
    assert max(tried) > 2 * longest >= tried[-1]
    assert caplog.text.count("out of memory, so packs are of") == 3  # 8, 4 and 2 times the longest
    tried.clear()
    monkeypatch.setattr(caching, "SHARD_ROWS", 5)
    stored(tmp_path / "shards", model, of, tokens_per_pack=16 * longest)
    assert sum(rows > 2 * longest for rows in tried) <= 3  # what one shard found out, the next ones know


def test_a_pair_that_is_too_large_by_itself_is_refused_and_what_was_stored_stays(tmp_path, monkeypatch):
    of, model = pairs(6), prepared()
    short_of_memory(monkeypatch, 1)
    with pytest.raises(InputError, match=r"out of memory with one pair of \d+ token rows: lower `data.max_length`"):
        stored(tmp_path, model, of)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_packs_are_wider_on_a_gpu_but_where_layers_are_compiled():
    collator = PairCollator(tokens_per_pack=512)
    assert caching._wider(collator, torch.device("cpu")) is collator
    assert caching._wider(collator, torch.device("cuda")).tokens_per_pack == 4 * 512
    compiled = replace(collator, bucket=256)
    assert caching._wider(compiled, torch.device("cuda")) is compiled


# ---- ranks and kills


def test_shares_of_ranks_are_whole_together_and_overlap_nowhere(tmp_path):
    of, model = [*pairs(15), *pairs(4, seed=5)], prepared()
    store, counts = store_of(tmp_path / "shared", model), []
    for rank in (2, 0, 1):  # whatever the others have written by then
        report = cache_reference(model, of, store, collator=PairCollator(), rank=rank, world=3)
        counts.append(report.computed)
    assert sum(counts) == len(store_of(tmp_path / "none", model).missing(of))
    assert min(counts) > 0
    alone = values(stored(tmp_path / "alone", model, of))
    assert torch.allclose(values(store.look_up(of)), alone, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.row("35")
def test_killed_at_any_moment_at_most_one_shard_is_computed_twice(tmp_path, monkeypatch):
    of, model, shard = pairs(3), prepared(), 4
    monkeypatch.setattr(caching, "SHARD_ROWS", shard // 2)
    folder, log = tmp_path / "store", tmp_path / "computed"
    store = ReferenceStore(folder, context_of(model, **WORDS))
    expected = values(stored(tmp_path / "whole", model, of))

    def note(count: int) -> None:
        with log.open("a") as file:
            print(count, file=file)

    def work() -> None:
        cache_reference(model, of, store, collator=PairCollator())

    watched_scores(monkeypatch, note)
    twice = []
    for number, _ in enumerate(moments(work, folder)):
        work()
        twice.append(sum(map(int, log.read_text().split())) - 2 * len(of))
        assert torch.equal(values(store.look_up(of)), expected)
        folder.rename(tmp_path / f"done-{number}")
        log.unlink()
    assert set(twice) == {0, 2, shard}  # the last shard has one pair
    assert len(twice) > 10


# ---- spot checks


def perturbed(of: list[TokenizedPair], by: float) -> list[TokenizedPair]:
    """One stored value among many, elsewhere."""
    chosen, rejected = of[4].reference
    return [*of[:4], replace(of[4], reference=(chosen, rejected + by)), *of[5:]]


@pytest.mark.row("35")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_perturbed_value_fails_the_spot_check(tmp_path, dtype):
    of, model = pairs(12), prepared(dtype=dtype)
    found = stored(tmp_path, model, of)
    spot_check(model, found, collator=PairCollator(), seed=3)
    for by in (0.25, -3.0, float("nan")):
        with pytest.raises(InputError, match=r"rejected answer of pair 'pair-4'.*a live pass gives.*more than noise"):
            spot_check(model, perturbed(found, by), collator=PairCollator(), seed=3)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_noise_is_measured_and_said(tmp_path, layout):
    of, model = pairs(40), prepared(dtype=torch.bfloat16, layout=layout)
    found = stored(tmp_path, model, of, layout=layout)
    check = spot_check(model, found, collator=PairCollator(layout), seed=3, count=7)
    assert check.worst <= check.tolerance
    assert check.noise < check.tolerance
    assert "7 of 40 pairs checked" in str(check)
    assert "nats in bfloat16" in str(check)
    assert set(check.as_dict()) == {"pairs", "of", "worst", "noise", "tolerance", "dtype"}


def test_seeds_draw_other_pairs(tmp_path, monkeypatch):
    of, model = pairs(40), prepared()
    found, drawn = stored(tmp_path, model, of), []

    def seen(model, rows, collator):
        drawn.append({answer.key for row in rows for answer in row})
        return score(model, rows, collator)

    monkeypatch.setattr(caching, "score", seen)
    for seed in (0, 0, 1):
        spot_check(model, found, collator=PairCollator(), seed=seed, count=5)
    first, again, other = drawn[::3]
    assert first == again != other
    assert first <= {answer.key for answer in answers_of(of)}


def test_pairs_that_were_not_looked_up_cannot_be_checked():
    with pytest.raises(InputError, match="were not looked up"):
        spot_check(prepared(), pairs(3), collator=PairCollator(), seed=0)


def test_a_store_of_other_weights_fails_the_check(tmp_path):
    """As when a context said too little: the log-probs of the base for a policy that is continued."""
    found = stored(tmp_path, prepared(trained=False), pairs(12))
    with pytest.raises(InputError, match="more than noise"):
        spot_check(prepared(trained=True), found, collator=PairCollator(), seed=0)
