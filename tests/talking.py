"""A tiny base, packs that change what it says, and a template, for the tests that talk."""

from pathlib import Path

import torch
from tiny_run import write_base

import deepen
from deepen.model import new_parameters

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_pack(base: Path, pack: Path, *, seed: int, size: float) -> Path:
    """Write a pack whose blocks, of random change, do something."""
    model = deepen.load(base)
    deepen.insert_blocks(model, deepen.plan_layout(len(model.model.layers), blocks=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((noise * size).to(parameter.dtype))
    return deepen.save_blocks(model, pack)


def write_places(root: Path) -> Path:
    """Write `base`, `law` and `code`, packs on it, and `talk.jinja` into a directory."""
    write_base(root / "base", max_position_embeddings=128)
    write_pack(root / "base", root / "law", seed=0, size=0.5)
    write_pack(root / "base", root / "code", seed=1, size=0.5)
    (root / "talk.jinja").write_text(TEMPLATE)
    return root
