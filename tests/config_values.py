"""A value for each key of a config, other than its default and than what the tests' own config says."""

from __future__ import annotations

BY_FILE = "by: margin, scores: scores.jsonl, unscored: leave_out"
BY_BOTH = "by: [score_gap, margin], scores: scores.jsonl, bounds: {margin: [-1.0, 1.0]}"
# Of a step of `data.steps`: a step in which the key has such a value.
STEP_OF = {
    "pairs.of": "{pairs: {of: all}}",
    **dict.fromkeys(["select.by", "select.keep", "select.which"], "{select: {by: score_gap, keep: 0.5}}"),
    **dict.fromkeys(["select.scores", "select.unscored"], f"{{select: {{{BY_FILE}, keep: 5}}}}"),
    "select.bounds": f"{{select: {{{BY_BOTH}, keep: 5}}}}",
    **dict.fromkeys(["order.by", "order.first"], "{order: {by: length_gap, first: lowest}}"),
    **dict.fromkeys(["order.scores", "order.unscored"], f"{{order: {{{BY_FILE}, first: lowest}}}}"),
    "order.bounds": f"{{order: {{{BY_BOTH}, first: highest}}}}",
    **dict.fromkeys(["chunk.take", "chunk.of", "chunk.seed"], "{chunk: {take: 1, of: 3, seed: 5}}"),
    **dict.fromkeys(["flip.share", "flip.seed", "flip.scores"], "{flip: {share: 0.2, seed: 5, scores: stay}}"),
}
# Of `reference`: one in which the key has such a value.
MEMBERS = "kind: several, members: [base, runs/dpo/adapter]"
REFERENCE_OF = {
    "adapter": "{kind: adapter, adapter: runs/dpo/adapter}",
    "every": "{kind: moving, every: 7}",
    "mixing": "{kind: moving, mixing: 0.6}",
    "members": f"{{{MEMBERS}}}",
    "combine": f"{{{MEMBERS}, combine: geometric}}",
    "weights": f"{{{MEMBERS}, weights: [0.25, 0.75]}}",
    "clip": f"{{{MEMBERS}, clip: 0.2}}",
}

# Where the annotation does not give it.
OTHER_VALUES = {
    "name": "another",
    "recipe": "mistral-7b-dpo",
    "model.name": "another",
    "model.revision": "0123456789abcdef0123456789abcdef01234567",
    "model.dtype": "bfloat16",
    "model.shape": "{model_type: llama}",
    "adapter.r": "4",
    "adapter.alpha": "4",
    "adapter.targets": "[q_proj]",
    "adapter.allow_dropout": "true",
    "adapter.use_rslora": "true",
    "adapter.use_dora": "true",
    "adapter.init": "gaussian",
    "adapter.rank_pattern": "{q_proj: 4}",
    "adapter.alpha_pattern": "{q_proj: 4}",
    "adapter.modules_to_save": "[norm]",
    "adapter.trainable_tokens": "[5]",
    "model.quantization": "nf4",
    "training.loraplus_lr_ratio": "16",
    "training.lr_scheduler_type": "cosine",
    "data.train": "another.jsonl",
    "data.eval": "another.jsonl",
    "data.max_length": "77",
    "data.form": "sharegpt",
    "data.columns": "{prompt: question}",
    "data.revision": "0123456789abcdef0123456789abcdef01234567",
    "data.split": "test",
    "data.chat_template_kwargs": "{enable_thinking: false}",
    "data.on_bad_row": "error",
    "data.leave_out": "suspects.txt",
    "data.cache": "false",
    "objective.beta": "0.3",
    "objective.gamma": "0.07",
    "reference.identity_probe": "false",
    "training.pairs_per_step": "7",
    "training.warmup_ratio": "0.1",
    "training.activation_checkpointing": "mlp",
    "training.seed": "7",
    "training.data_seed": "7",
    "training.report_to": "none",
    "training.log_level": "info",
    "training.log_level_replica": "info",
    "packing.layout": "padded",
    "packing.tokens": "77",
    "kernels.adapters": "peft",
    "kernels.elementwise": "triton",
    "kernels.compile": "true",
}
