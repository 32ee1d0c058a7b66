"""A process of its own: scores, gradients and a short training of one base through one backend, for a comparison.

    python -m tests.model.backends.one_run unsloth BASE FOLDER [float32]

writes FOLDER/tensors.safetensors (log-probs with the adapter on and off, and each gradient) and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 4
REPEATS = 3


def main(backend: str, base: str, folder: Path, dtype: str = "bfloat16") -> None:
    """In float32, which unsloth's backend refuses otherwise, as little as Triton's interpreter can do in a minute."""
    small = dtype == "float32"
    if backend != "transformers":  # first: it changes what is imported below
        from lorafocal.model.backends import named

        named(backend).start()
        if small:
            named(backend).check_supported = lambda *_, **__: None

    import torch
    from safetensors.torch import save_file

    from lorafocal.data.packing import pad_sequences
    from lorafocal.model.adapters import AdapterSwitch, attach_lora
    from lorafocal.model.load import load_base, local_device
    from lorafocal.policy import token_logps
    from lorafocal.probes import choose_layout
    from tests.tiny import adapter_gradients, disturb, lora, pairs, trainer

    def loaded() -> Any:
        if backend == "transformers":
            return load_base(base, dtype=dtype)
        return named(backend).load(base, max_length=256, dtype=dtype)[0]

    model = loaded()
    torch.manual_seed(0)  # here: loading may draw numbers too
    policy = disturb(attach_lora(model, lora()))
    layout = choose_layout(policy, "padded" if small or backend == "transformers" else "auto")
    pack = pad_sequences(pairs(2, longest=8) if small else pairs(8, longest=60)).to(local_device())
    on = token_logps(policy, pack)
    (on * torch.linspace(-1, 1, len(on), device=on.device)).sum().backward()
    tensors = adapter_gradients(policy)
    with torch.no_grad(), AdapterSwitch(policy).off():
        tensors |= {"on": on.detach(), "off": token_logps(policy, pack)}
    save_file(
        {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors"
    )

    began = time.perf_counter()
    for _ in range(1 if small else REPEATS):
        token_logps(policy, pack).sum().backward()
        float(adapter_gradients(policy).popitem()[1].sum())  # waits for the device
    seconds = (time.perf_counter() - began) / REPEATS

    made = trainer(
        folder,
        pairs(4, longest=8) if small else pairs(16, longest=40),
        model=loaded(),
        peft_config=lora(),
        max_steps=1 if small else STEPS,
        layout="padded",
        reference="disabled_adapter",
        tokens_per_pack=2048,
        use_cpu=not torch.cuda.is_available(),
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    print(json.dumps({"layout": layout.layout, "reason": layout.reason, "losses": losses, "pass_s": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
