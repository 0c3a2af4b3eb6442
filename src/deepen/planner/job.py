from dataclasses import dataclass
from pathlib import Path

from deepen.config import TrainSection
from deepen.expansion import Layout


@dataclass(frozen=True)
class TeacherFiles:
    """What `train.teacher` names: a directory or `config.json`, and the new blocks that are put on it."""

    source: Path
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, as far as its cost depends on it.

    Attributes:
        source: the base's directory, or its `config.json` alone.
        layout: where new blocks go; None for methods that add none.
        train: method, precision, optimiser and what else a recipe says.
        length: tokens of a window.
        windows: windows in one optimiser step.
        micro_batch: windows in one forward pass.
        document_masks: whether documents within a window are parted.
        tokens: to train on in all; None where it is not known.
        devices: how many share each step.
        teacher: the model whose predictions are learned; None: the text's own words are.
    """

    source: Path
    layout: Layout | None
    train: TrainSection
    length: int
    windows: int
    micro_batch: int
    document_masks: bool = False
    tokens: int | None = None
    devices: int = 1
    teacher: TeacherFiles | None = None

    @property
    def passes(self) -> int:
        """Forward passes of each device in one optimiser step."""
        share = -(-self.windows // self.devices)
        return -(-share // self.micro_batch)

    @property
    def anchor_windows(self) -> int:
        """Windows of the anchor in one optimiser step; 0 without one."""
        anchor = self.train.anchor
        return anchor.windows(self.windows) if anchor else 0

    @property
    def optimiser_steps(self) -> int | None:
        """Steps of the whole run, where its tokens are known."""
        return self.tokens and -(-self.tokens // (self.windows * self.length))

    def precision(self, kind: str) -> str:
        """Return `bf16` or `fp32`, as it is computed on a kind of device."""
        asked = self.train.precision
        return asked if asked != "auto" else "fp32" if kind == "cpu" else "bf16"
