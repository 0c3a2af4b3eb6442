from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, atomic_directory
from deepen.config import LoraSection
from deepen.errors import OutputError, TrainingError
from deepen.expansion import Progress
from deepen.methods.full import Full
from deepen.methods.method import nearest, widen
from deepen.model import find_expansion, new_parameters, save_tensors
from deepen.model.structure import family_of

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER: Final = "adapter"
_WEIGHTS: Final = "adapter_model.safetensors"


class Lora:
    """Low-rank adaptation by peft (arXiv 2106.09685), on all linear layers of the blocks, with alpha = 2 r.

    These are the settings in which LoRA is a fair control (arXiv 2405.09673). `rslora` scales by
    alpha / sqrt(r) (arXiv 2312.03732), `dora` trains magnitudes apart from directions (arXiv 2402.09353).

    Modules that are to be saved train as whole copies beside the base's; of tied embeddings and head both
    names lead to one copy.
    """

    name: Final = "lora"
    keeps_base: Final = True

    def __init__(self, section: LoraSection, match_parameters: int | None = None) -> None:
        """Take the settings of a recipe; `match_parameters` decides the rank instead."""
        self._section, self._match = section, match_parameters

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Add the adapter, which begins as nothing: B is zero.

        Raises:
            TrainingError: no gradient would ever reach the adapter of a new block, or a module to be saved is
                not there, or would come apart from the one it is tied to.
        """
        from peft import LoraConfig

        model.requires_grad_(False)
        whole, tied = list(self._section.modules_to_save), _is_tied(model)
        rank = self._rank(model)
        config = LoraConfig(
            r=rank,
            lora_alpha=self._section.alpha or 2 * rank,
            lora_dropout=self._section.dropout,
            use_rslora=self._section.variant == "rslora",
            use_dora=self._section.variant == "dora",
            target_modules="all-linear",
            modules_to_save=whole or None,
            ensure_weight_tying=bool(whole) and tied,
            task_type="CAUSAL_LM",
        )
        _check_named(model, whole)
        model.add_adapter(config)
        _copy_whole(model, config)
        if tied and not _is_tied(model):
            raise TrainingError(
                f"lora.modules_to_save: {', '.join(whole)}: this model's head is its embeddings, and peft "
                "would train one apart from the other\nleave them out"
            )
        _check_reached(model)
        return widen({name: p for name, p in model.named_parameters() if p.requires_grad})

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Nothing is rounded: an adapter is saved in fp32."""
        return {}

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `adapter/`, in peft's format."""
        target = run / ADAPTER
        # Not by save_pretrained, which leaves out a saved head that is tied: peft looks for both.
        held = {f"base_model.model.{name}": each for name, each in model.get_adapter_state_dict().items()}
        with atomic_directory(target, overwrite=True, inside=(base.directory,)) as staged:
            save_tensors(staged / _WEIGHTS, held)
            try:
                model.peft_config["default"].save_pretrained(staged)
            except OSError as error:
                raise OutputError(f"{target}: cannot be written: {error}") from None
        return target

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Add the adapter to the matrices, in memory too, and write an ordinary checkpoint."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
            if isinstance(module, ModulesToSaveWrapper):
                trained: nn.Module = module.modules_to_save[str(module.active_adapter)]
                for name, parameter in module.original_module.named_parameters():
                    parameter.data = trained.get_parameter(name).data
        return Full().save(model, run, base)

    def _rank(self, model: PreTrainedModel) -> int:
        if self._match is None:
            return self._section.rank
        head = model.get_output_embeddings()
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        return nearest(self._match, sum(m.in_features + m.out_features for m in linears))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_named(model: PreTrainedModel, whole: Sequence[str]) -> None:
    expansion = find_expansion(model)
    if whole and expansion and expansion.new_rows:
        raise TrainingError(
            "lora.modules_to_save: the block pack brings new rows, which a copy of the tables would hide\n"
            "leave modules_to_save out, or merge the pack and tune that"
        )
    names = [name for name, _ in model.named_modules()]
    for wanted in whole:
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            raise TrainingError(
                f"lora.modules_to_save: the model has no module {wanted!r}; "
                f"its embeddings and head are {_tables(model)}"
            )


def _tables(model: PreTrainedModel) -> str:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return ", ".join(name for name, module in model.named_modules() if any(module is each for each in tables))


def _copy_whole(model: PreTrainedModel, config: "LoraConfig") -> None:
    """Give the modules to be saved a trainable copy: what peft does for a model of its own class."""
    from peft.utils import set_additional_trainable_modules

    set_additional_trainable_modules(model, config, model.config.to_dict(), "default")


def _check_reached(model: PreTrainedModel) -> None:
    """Refuse new blocks that write nothing and are not given anything to write by their adapter.

    A matrix that is zero is: its B gets a gradient, and then so does all before and behind it. A gain is not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if (expansion := find_expansion(model)) is None:
        return
    family, zero = family_of(model), {block.index: block.zero for block in expansion.layout.new_blocks}
    for name, parameter in new_parameters(model).items():
        place = family.split(name.replace(".base_layer.", "."))
        value = family.fill(place[1], zero[place[0]]) if place and not name.endswith("bias") else None
        owner = model.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
        if value is not None and not isinstance(owner, BaseTunerLayer) and bool((parameter == value).all()):
            raise TrainingError(
                f"lora: new block {place[0] if place else ''} is untrained and its {name.rpartition('.')[2]} "
                f"({name}) has no adapter, so no gradient would reach the block's\n"
                "train the new blocks first, or tune with trainable: new or all"
            )
