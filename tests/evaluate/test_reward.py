"""Rewards: against transformers one answer at a time, whatever is in the batch; and the win rate they give."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate.result import prompt_sha256, read_result
from lorafocal.evaluate.reward import evaluate_reward
from lorafocal.evaluate.reward_model import RewardModel, open_reward_model
from tests.tiny import enlarged

LONGEST = 48


def save_causal(folder: Path, **changes: object) -> Path:
    """A Llama classifier, which reads the last token that is not padding, with a chat template."""
    tokenizer = toy_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGEST,
        "num_labels": 1,
        "pad_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return saved(LlamaForSequenceClassification, LlamaConfig(**settings | changes), tokenizer, folder)


def save_encoder(folder: Path) -> Path:
    """A BERT classifier, which reads all tokens both ways, with token types and without a chat template."""
    words = sorted({word for row in rows(12) for text in row for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        num_labels=1,
    )
    return saved(BertForSequenceClassification, config, tokenizer, folder)


def saved(kind: type, config: object, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    torch.manual_seed(3)
    enlarged(kind(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of ragged lengths."""
    found = []
    for number, row in enumerate(toy_preferences(count, seed=5, held_out=True)):
        answer = row["chosen"][-1]["content"] if isinstance(row["chosen"], list) else row["chosen"]
        prompt = row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"]
        found.append((prompt, " ".join([answer] * (1 + number % 4))))
    return found


def alone(folder: Path, answered: Sequence[tuple[str, str]], *, templated: bool) -> list[float]:
    """One at a time, without a batch or padding, as a model card has it."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, answer in answered:
        if templated:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            inputs = dict(tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt"))
        else:
            inputs = dict(tokenizer(prompt, answer, return_tensors="pt"))
        with torch.no_grad():
            found.append(model(**inputs).logits.item())
    return found


def write(path: Path, answered: Sequence[tuple[str, str]], generator: str = "mine") -> Path:
    records = [{"instruction": p, "output": a, "generator": generator} for p, a in answered]
    path.write_text(json.dumps(records))
    return path


def quiet(text: str) -> None:
    """Where progress goes."""


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def judge(causal: Path) -> RewardModel:
    return open_reward_model(str(causal))


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_a_reward_is_that_of_the_answer_alone_whatever_is_beside_it(causal: Path, tokens_per_batch: int) -> None:
    answered = rows(12)
    found = open_reward_model(str(causal)).rewards(answered, tokens_per_batch=tokens_per_batch)
    expected = alone(causal, answered, templated=True)
    assert len({len(answer) for _, answer in answered}) > 3, "ragged"
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1, "the model tells them apart"


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_without_a_template_prompt_and_answer_are_a_pair_of_texts(encoder: Path, tokens_per_batch: int) -> None:
    judge = open_reward_model(str(encoder))
    found = judge.rewards(rows(12), tokens_per_batch=tokens_per_batch)
    assert judge.form == "as a pair of texts"
    assert found == pytest.approx(alone(encoder, rows(12), templated=False), abs=1e-5)


@pytest.mark.row("58")
def test_an_end_of_turn_is_not_taken_for_padding(causal: Path) -> None:
    """A model without padding reads the last token, which the padding of many tokenizers is too."""
    judge = open_reward_model(str(causal))
    judge.tokenizer.pad_token = judge.tokenizer.eos_token
    assert judge.rewards(rows(6)) == pytest.approx(alone(causal, rows(6), templated=True), abs=1e-5)
    assert judge.model.config.pad_token_id is None


def test_a_model_s_own_padding_is_kept(tmp_path: Path) -> None:
    folder = save_causal(tmp_path, pad_token_id=2)
    assert open_reward_model(str(folder)).rewards(rows(6)) == pytest.approx(
        alone(folder, rows(6), templated=True), abs=1e-5
    )


def test_a_conversation_is_rendered_whole(judge: RewardModel) -> None:
    prompt, answer = rows(1)[0]
    asked = [{"role": "user", "content": prompt}]
    assert judge.rewards([(asked, answer)]) == judge.rewards([(prompt, answer)])


def test_mean_reward_and_win_rate_by_hand(causal: Path, tmp_path: Path, judge: RewardModel) -> None:
    ours = rows(12)
    theirs = [(prompt, answer if n % 3 == 0 else ours[n - 1][1]) for n, (prompt, answer) in enumerate(ours)]
    result = evaluate_reward(
        write(tmp_path / "mine.json", ours),
        model=str(causal),
        against=write(tmp_path / "base.json", theirs[::-1], "base"),
        say=quiet,
    )
    own, other = judge.rewards(ours), judge.rewards(theirs)
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(own, other, strict=True)]
    assert result.scores["mean_reward"].value == pytest.approx(sum(own) / 12, abs=1e-5)
    assert result.scores["mean_reward_against"].value == pytest.approx(sum(other) / 12, abs=1e-5)
    assert result.scores["win_rate"].value == pytest.approx(100 * sum(won) / 12)
    assert result.counts["tied"] == 4, "the same answer is half a win"
    assert result.counts["compared"] == result.counts["won"] + 4 + result.counts["lost"] == 12
    low, high = result.scores["win_rate"].low, result.scores["win_rate"].high
    assert low < result.scores["win_rate"].value < high
    assert [item["prompt_sha256"] for item in result.items] == [prompt_sha256(prompt) for prompt, _ in ours]
    assert [item["score_against"] for item in result.items] == pytest.approx(other, abs=1e-5)
    result.write(tmp_path / "result.json")
    assert read_result(tmp_path / "result.json").scores == result.scores
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()


def test_the_same_answer_never_wins_by_the_rounding_of_a_batch(causal: Path, tmp_path: Path) -> None:
    answered = rows(40)
    others = [(prompt, answer if n % 2 else "no") for n, (prompt, answer) in enumerate(answered)]
    result = evaluate_reward(
        write(tmp_path / "mine.json", answered),
        model=str(causal),
        against=write(tmp_path / "base.json", others, "base"),
        dtype="bfloat16",
        tokens_per_batch=100,
        say=quiet,
    )
    same = [item for n, item in enumerate(result.items) if n % 2]
    assert all(item["score"] == item["score_against"] for item in same)
    assert result.counts["tied"] >= 20


def test_a_prompt_asked_twice_keeps_both_answers_and_strangers_are_counted(causal: Path, tmp_path: Path) -> None:
    ours = rows(4)
    again = [*ours, (ours[0][0], "another answer")]
    result = evaluate_reward(
        write(tmp_path / "mine.json", again),
        model=str(causal),
        against=write(tmp_path / "base.json", [*ours[1:], ours[0], ("a prompt of its own", "yes")], "base"),
        say=quiet,
    )
    assert (result.counts["answers"], result.counts["compared"], result.counts["unmatched"]) == (5, 4, 2)
    assert any("2 answers are to prompts" in note for note in result.notes)


def test_what_does_not_fit_has_no_reward_and_is_counted(causal: Path, tmp_path: Path) -> None:
    prompt, answer = rows(1)[0]
    long = (prompt, " ".join([answer] * 60))
    result = evaluate_reward(write(tmp_path / "mine.json", [*rows(3), long]), model=str(causal), say=quiet)
    assert result.counts["too_long"] == 1
    assert result.items[-1]["score"] is None
    assert any("1 of 4 answers do not fit into 48 tokens" in note for note in result.notes)
    with pytest.raises(InputError, match=r"no answer of .* fits"):
        evaluate_reward(write(tmp_path / "long.json", [long]), model=str(causal), say=quiet)


def test_what_is_no_reward_model_is_refused_in_a_sentence(causal: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 outputs; a reward model is a sequence classifier with one"):
        open_reward_model(str(save_causal(tmp_path / "three", num_labels=3)))
    with pytest.raises(InputError, match="there is no such folder"):
        open_reward_model(str(tmp_path / "absent"))
    from tests.saved_run import save_base

    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}))
    with pytest.raises(InputError, match=r"lacks 1 tensors of a reward model \(first: score.weight\)"):
        open_reward_model(str(base))


def test_answers_without_their_prompts_and_without_shared_ones_are_refused(causal: Path, tmp_path: Path) -> None:
    line = {"question_id": "q", "model_id": "m", "choices": [{"index": 0, "turns": [{"content": "yes"}]}]}
    (tmp_path / "arena.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="names its prompt by question_id alone"):
        evaluate_reward(tmp_path / "arena.jsonl", model=str(causal), say=quiet)
    one, two = write(tmp_path / "a.json", rows(2)), write(tmp_path / "b.json", [("other", "yes")])
    with pytest.raises(InputError, match="no prompt in common"):
        evaluate_reward(one, model=str(causal), against=two, say=quiet)
    mixed = json.loads(one.read_text())
    mixed[1]["generator"] = "another"
    two.write_text(json.dumps(mixed))
    with pytest.raises(InputError, match="holds answers of 2 models"):
        evaluate_reward(one, model=str(tmp_path / "not even looked for"), against=two, say=quiet)


def test_rewards_that_are_no_numbers_are_refused(causal: Path) -> None:
    judge = open_reward_model(str(causal))
    judge.model.score.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match="not finite in float32"):
        judge.rewards(rows(1))
