"""Add new transformer blocks to a pretrained language model, teach them a domain, prove what was kept.

::

    import deepen

    deepen.expand_checkpoint("base", "expanded", blocks=8)        # bytes only, no torch
    deepen.verify_bytes("base", "expanded").identical
    deepen.extract_pack("expanded", "pack")                       # the new blocks alone
    deepen.merge_pack("base", "pack", "merged")                   # an ordinary checkpoint
    deepen.unmerge("merged", "base-again")                        # the base, byte for byte

    deepen.insert_blocks(model, deepen.plan_layout(32, blocks=8)) # a live transformers model, in place
    deepen.freeze_base(model)                                     # only the new blocks train
    with deepen.bypass(model): ...                                # exactly the base
    deepen.save_blocks(model, "pack")
    model = deepen.load("base", "pack")
    deepen.attach(model, "other")                                 # several packs on one base,
    deepen.activate(model, "pack", "other")                       # one at a time or stacked
    model = deepen.load("base", "pack", switch="auto")            # or as each prompt itself decides

Names are imported when they are first used, so `import deepen` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepen.blocks import adopt as adopt
    from deepen.blocks import extract_pack as extract_pack
    from deepen.blocks import fit_pack as fit_pack
    from deepen.blocks import inspect_blocks as inspect_blocks
    from deepen.blocks import merge_pack as merge_pack
    from deepen.blocks import push_pack as push_pack
    from deepen.blocks import stack_packs as stack_packs
    from deepen.blocks import unmerge as unmerge
    from deepen.config import Recipe as Recipe
    from deepen.config import load_recipe as load_recipe
    from deepen.errors import DeepenError as DeepenError
    from deepen.expansion import Expansion as Expansion
    from deepen.expansion import Layout as Layout
    from deepen.expansion import NewBlock as NewBlock
    from deepen.expansion import expand_checkpoint as expand_checkpoint
    from deepen.expansion import plan_layout as plan_layout
    from deepen.expansion import verify_bytes as verify_bytes
    from deepen.model import Classifier as Classifier
    from deepen.model import Decision as Decision
    from deepen.model import Likelihood as Likelihood
    from deepen.model import Switch as Switch
    from deepen.model import activate as activate
    from deepen.model import attach as attach
    from deepen.model import attached as attached
    from deepen.model import bypass as bypass
    from deepen.model import decisions as decisions
    from deepen.model import detach as detach
    from deepen.model import expansion_of as expansion_of
    from deepen.model import freeze_base as freeze_base
    from deepen.model import insert_blocks as insert_blocks
    from deepen.model import load as load
    from deepen.model import save_blocks as save_blocks
    from deepen.model import set_switch as set_switch
    from deepen.model.callback import SaveBlocks as SaveBlocks
    from deepen.pipeline.run import run_recipe as run_recipe

_HOMES = {
    "Classifier": "model",
    "Decision": "model",
    "DeepenError": "errors",
    "Expansion": "expansion",
    "Layout": "expansion",
    "Likelihood": "model",
    "NewBlock": "expansion",
    "Recipe": "config",
    "SaveBlocks": "model.callback",
    "Switch": "model",
    "activate": "model",
    "adopt": "blocks",
    "attach": "model",
    "attached": "model",
    "bypass": "model",
    "decisions": "model",
    "detach": "model",
    "expand_checkpoint": "expansion",
    "expansion_of": "model",
    "extract_pack": "blocks",
    "fit_pack": "blocks",
    "freeze_base": "model",
    "insert_blocks": "model",
    "inspect_blocks": "blocks",
    "load": "model",
    "load_recipe": "config",
    "merge_pack": "blocks",
    "plan_layout": "expansion",
    "push_pack": "blocks",
    "run_recipe": "pipeline.run",
    "save_blocks": "model",
    "set_switch": "model",
    "stack_packs": "blocks",
    "unmerge": "blocks",
    "verify_bytes": "expansion",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepen' has no attribute {name!r}")
    return getattr(import_module(f"deepen.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
