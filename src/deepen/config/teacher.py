"""Another model whose predictions are learned."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from deepen.config.section import Real, Section


class TeacherSection(Section):
    """KL(teacher ‖ model) on the step's windows in place of their likelihood.

    The teacher is a frozen model of the base's vocabulary, held beside the model whole; `parallel: fsdp` is
    refused.
    """

    model: str
    """A run, a block pack of the base, or a checkpoint (a directory or a hub id)."""

    cross_entropy: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the text beside the divergence, both in nats per token."""


def _named(value: Any) -> Any:
    """Accept a teacher's name where that is all there is to say."""
    return {"model": value} if isinstance(value, str) else value


Teacher = Annotated[TeacherSection, BeforeValidator(_named)]
