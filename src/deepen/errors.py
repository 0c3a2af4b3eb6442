"""The errors a user can meet.

::

    DeepenError                 anything below; the command line prints it and exits with `exit_code`
    ├── RecipeError             a recipe that cannot be read or holds faults (all of them, one a line)
    ├── CheckpointError         a checkpoint that is missing, malformed or not what its config says
    │   └── FamilyError         a model whose blocks deepen does not know
    ├── LayoutError             new blocks that cannot be placed as asked
    ├── OutputError             an output that exists, lies inside its input, or does not fit the disk
    ├── PackError               a block pack that does not belong to this base
    ├── SwitchError             a switch that cannot be read, or cannot decide as asked
    ├── DataError               a text source that is missing, empty or lacks its field
    ├── TrainingError           training that cannot start, resume or go on
    │   └── Diverged            the loss or a gradient is no longer a finite number
    ├── SandboxError            a machine on which a model's code cannot be run safely
    ├── EvaluationError         a task that cannot be found, read or scored
    ├── StudyError              a study that cannot go on, or whose results cannot be traced
    ├── ChatError               a conversation that cannot be held as asked
    ├── Interrupted             work stopped on request, after saving (exit code 130)
    └── CheckFailed             a check that ran and said no (exit code 3)

A program that uses deepen as a library writes ``except deepen.DeepenError``. Everything else that is
raised is a bug of ours.
"""


class DeepenError(Exception):
    """Base class; `str(error)` is one or two lines: what, where, what was found, what to do."""

    exit_code = 2


class RecipeError(DeepenError):
    """A recipe that cannot be read, or whose keys, types or values are wrong."""


class CheckpointError(DeepenError):
    """A checkpoint that is missing, malformed, unsafe to follow, or disagrees with its config."""


class FamilyError(CheckpointError):
    """A model family that deepen has no exact description of."""


class LayoutError(DeepenError):
    """New blocks that cannot be placed as asked."""


class OutputError(DeepenError):
    """An output that exists already, lies inside its input, or does not fit on the disk."""


class PackError(DeepenError):
    """A block pack that is malformed or does not belong to this base."""


class SwitchError(DeepenError):
    """A switch between packs that is malformed, was made for others, or cannot decide as asked."""


class DataError(DeepenError):
    """A text source that is missing, empty, or lacks the field named."""


class TrainingError(DeepenError):
    """Training that cannot start, resume or go on."""


class Diverged(TrainingError):
    """Training whose loss or gradient is no longer a finite number."""


class SandboxError(DeepenError):
    """A machine on which code that a model wrote cannot be run safely."""


class EvaluationError(DeepenError):
    """An evaluation task that cannot be found, read or scored."""


class StudyError(DeepenError):
    """A study that cannot go on, or whose results could not be traced to their code."""


class ChatError(DeepenError):
    """A conversation that cannot be held as asked: no room, no base, no such pack."""


class Interrupted(DeepenError):
    """Work that stopped on SIGINT or SIGTERM after saving what was done."""

    exit_code = 130


class CheckFailed(DeepenError):
    """A check that ran and said no, for example an expanded checkpoint that is not its base."""

    exit_code = 3


def in_a_line(error: BaseException, most: int = 160) -> str:
    """Return what another library's error says, in one line of at most so many characters, or its name."""
    return " ".join(str(error).split())[:most] or type(error).__name__
