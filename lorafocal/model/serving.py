"""What programs that serve adapters make of an adapter as PEFT writes it: what they refuse, and what they misread.

From their published readers: vLLM's `vllm/lora/peft_helper.py`, `lora_model.py` and `config/lora.py`, llama.cpp's
`convert_lora_to_gguf.py` and `src/llama-adapter.h` (commits: `tests/release/test_loads_elsewhere.py`).
"""

from __future__ import annotations

from peft import LoraConfig

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; 16 where it is not given
_USUAL_RANK = 16
_MERGED = "serve the merged model there"


def serving_notes(config: LoraConfig) -> tuple[str, ...]:
    """One line for each thing that vLLM or llama.cpp does not take as it is; none where both read the adapter right."""
    notes = []
    if config.use_dora:
        notes.append(f"vLLM and llama.cpp's converter refuse DoRA: {_MERGED}.")
    if config.modules_to_save:
        notes.append(f"vLLM and llama.cpp's converter refuse trained modules (`modules_to_save`): {_MERGED}.")
    if config.trainable_token_indices:
        notes.append(f"vLLM and llama.cpp's converter refuse trained tokens: {_MERGED}.")
    if config.use_rslora or config.alpha_pattern:
        why = "rank-stabilised scaling" if config.use_rslora else "an alpha a layer"
        notes.append(
            f"llama.cpp knows one alpha and divides it by the rank: {why} it gets wrong without a word; {_MERGED}."
        )
    if config.rank_pattern or config.alpha_pattern:
        notes.append(
            "Versions of vLLM that do not read `rank_pattern` and `alpha_pattern` scale some layers wrongly without a"
            f" word: {_MERGED}, unless yours reads them."
        )
    return (*notes, *_rank_notes(max([config.r, *config.rank_pattern.values()])))


def serving_section(config: LoraConfig) -> str:
    """`serving_notes` as the end of a card; nothing where there are none."""
    lines = "".join(f"- {note}\n" for note in serving_notes(config))
    return f"\n## Serving\n\n{lines}" if lines else ""


def _rank_notes(rank: int) -> tuple[str, ...]:
    if rank <= _USUAL_RANK:
        return ()
    enough = [limit for limit in VLLM_RANKS if limit >= rank]
    if not enough:
        return (f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this is {rank}: {_MERGED}.",)
    return (f"vLLM is started with `--max-lora-rank {enough[0]}` for rank {rank}.",)
