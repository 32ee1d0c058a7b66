"""What every implementation is given: the same pairs as rows of text, and a tokenizer, in one folder.

    rows.jsonl     preference rows, in the order in which they are trained on
    tokenizer/     whole words for made-up pairs, so that lengths are exact; for a file, trained on its own text
    lengths.json   tokens of (prompt, chosen, rejected), pair by pair

Made-up pairs follow a distribution of lengths; files are given by path and named by a label, never by the path. Of a
file's pairs a step or two differ much from the rest: of many samples that one is taken whose lengths make as much work,
padded and not, as the file's do on average (`like_the_whole`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafocal.data.sources import Preference, read_preferences
from lorafocal.data.tokens import TokenizedPair, tokenize_preferences
from lorafocal.sampler import shuffled

SEED = 0
DRAWS = 1000  # samples of a file, of which one is chosen
LARGEST_VOCABULARY = 32000  # of what is trained on a file: enough for its text
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
Triple = tuple[int, int, int]  # tokens of prompt, chosen and rejected answer


@dataclass(frozen=True)
class Distribution:
    """Mean tokens of prompt and answers, and the sigma of their logarithms; 0 is that length exactly."""

    prompt: float
    answer: float
    sigma: float = 0.0

    def draw(self, source: random.Random, longest: int) -> tuple[int, int, int]:
        """(prompt, chosen, rejected), drawn again until prompt and longer answer fit."""
        while True:
            prompt, *answers = (self._length(mean, source) for mean in (self.prompt, self.answer, self.answer))
            if prompt + max(answers) <= longest:
                return prompt, answers[0], answers[1]

    def _length(self, mean: float, source: random.Random) -> int:
        return max(2, round(mean * source.lognormvariate(-(self.sigma**2) / 2, self.sigma)))


# Means: UltraFeedback's as stated by its users; answers of Llama-3-Instruct for armorm, whose 400 is assumed.
DISTRIBUTIONS = {
    "256+2x384": Distribution(256, 384),
    "ultrafeedback-like": Distribution(192, 305, 0.7),
    "armorm-like": Distribution(205, 400, 0.7),
    "tiny": Distribution(16, 24, 0.5),
}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the inputs; their mean lengths. A process of its own, since text is trained on and tokenised.

    `steps` of the settings, where given: (pairs a step, steps before the clock starts), to draw a file's sample by.
    """
    folder, pairs, longest = Path(settings["folder"]), settings["pairs"], settings["max_length"]
    data, vocabulary = settings["data"], settings["vocabulary"]
    if data in DISTRIBUTIONS:
        tokenizer = word_tokenizer(vocabulary)
        preferences = made_up(DISTRIBUTIONS[data], pairs, longest, vocabulary)
    else:
        preferences = read_preferences(Path(data)).pairs
        tokenizer = trained_tokenizer(preferences, min(vocabulary, LARGEST_VOCABULARY))
    kept = tokenize_preferences(preferences, tokenizer, max_length=longest).pairs
    if len(kept) < pairs:
        raise SystemExit(f"only {len(kept)} pairs fit {longest} tokens, and {pairs} are needed")
    if settings.get("steps") and data not in DISTRIBUTIONS:
        chosen = [kept[i] for i in like_the_whole([lengths_of(pair) for pair in kept], pairs, *settings["steps"])]
    else:
        chosen = [kept[i] for i in shuffled(len(kept), SEED, 0)[:pairs]]
    by_id = {preference.id: preference for preference in preferences}
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for pair in chosen:
            row = asdict(by_id[pair.id])
            file.write(json.dumps({name: row[name] for name in ("id", "prompt", "chosen", "rejected")}) + "\n")
    tokenizer.save_pretrained(folder / "tokenizer")
    lengths = [lengths_of(pair) for pair in chosen]
    (folder / "lengths.json").write_text(json.dumps(lengths), encoding="utf-8")
    means = (sum(column) / pairs for column in zip(*lengths, strict=True))
    return dict(zip(("prompt tokens", "chosen tokens", "rejected tokens"), means, strict=True))


def lengths_of(pair: TokenizedPair) -> Triple:
    return len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)


def like_the_whole(lengths: Sequence[Triple], pairs: int, per_step: int, warmup: int) -> list[int]:
    """Which `pairs` to train on: of DRAWS samples the one nearest to their mean in what its timed steps compute.

    Lengths alone decide, so nothing that is measured can. `lengths` are tokens of (prompt, chosen, rejected).
    """
    draws = [shuffled(len(lengths), seed, 0)[:pairs] for seed in range(DRAWS)]
    trained = shuffled(pairs, SEED, 0)[warmup * per_step :]  # in this order, by everybody
    found = [work([lengths[draw[i]] for i in trained], per_step) for draw in draws]
    means = [sum(column) / DRAWS for column in zip(*found, strict=True)]
    away = [max(abs(value / mean - 1) for value, mean in zip(one, means, strict=True)) for one in found]
    return draws[min(range(DRAWS), key=away.__getitem__)]


def work(lengths: Sequence[Triple], per_step: int) -> tuple[float, float, float, float]:
    """Rows of (batches of a step's pairs, padded; pairs with one prompt), and their squares, as attention has them."""
    padded = padded_squares = 0
    for start in range(0, len(lengths), per_step):
        batch = lengths[start : start + per_step]
        width = max(prompt + max(answers) for prompt, *answers in batch)
        padded += 2 * len(batch) * width
        padded_squares += 2 * len(batch) * width**2
    own = sum(map(sum, lengths))
    own_squares = sum((p + c) ** 2 + (p + r) ** 2 - p**2 for p, c, r in lengths)
    return padded, own, padded_squares, own_squares


def made_up(distribution: Distribution, count: int, longest: int, vocabulary: int) -> list[Preference]:
    """Pairs of random words, a token each; the end of an answer is its last token."""
    source = random.Random(SEED)

    def words(number: int) -> str:
        return " ".join(str(source.randrange(len(SPECIAL), vocabulary)) for _ in range(number))

    made = []
    for number in range(count):
        prompt, chosen, rejected = distribution.draw(source, longest)
        made.append(Preference(words(prompt), f" {words(chosen - 1)}", f" {words(rejected - 1)}", str(number)))
    return made


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token a word; words are the token's own number."""
    words = {**{str(i): i for i in range(len(SPECIAL), vocabulary)}, **{word: i for i, word in enumerate(SPECIAL)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def trained_tokenizer(preferences: list[Preference], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the preferences' own text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(preferences), trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:], chat_template=TEMPLATE,
    )  # fmt: skip


def _texts(preferences: list[Preference]) -> Iterator[str]:
    for preference in preferences:
        for part in (preference.prompt, preference.chosen, preference.rejected):
            yield part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_lengths(folder: Path) -> list[tuple[int, int, int]]:
    return [tuple(row) for row in json.loads((folder / "lengths.json").read_text(encoding="utf-8"))]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "tokenizer")
