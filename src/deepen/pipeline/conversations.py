"""The conversations a recipe tunes on, tokenised and mixed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.config import SftSection
from deepen.data.batches import Mixture
from deepen.data.chat import ChatTemplate, choose_template
from deepen.data.conversation_build import mix_conversations, prepare_conversations
from deepen.data.conversation_corpus import ConversationCorpus
from deepen.errors import RecipeError
from deepen.pipeline.reporter import Reporter

# arXiv 2401.02415, section 4.1.
_PAPER_LENGTH: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """What is tuned on.

    Attributes:
        template: how messages become one text.
        corpora: one a set.
        mixture: where batches come from.
    """

    template: ChatTemplate
    corpora: list[ConversationCorpus]
    mixture: Mixture


def window_length(section: SftSection, config: dict[str, Any]) -> int:
    """Return the tokens of a window: those asked for, or the paper's as far as the base has positions.

    Args:
        section: what was asked.
        config: the base's config.json.

    Raises:
        RecipeError: the base has fewer positions than that.
    """
    positions = config.get("max_position_embeddings")
    most = positions if isinstance(positions, int) else None
    asked = section.sequence_length
    if asked is None:
        return min(_PAPER_LENGTH, most or _PAPER_LENGTH)
    if most is not None and asked > most:
        raise RecipeError(f"sft.sequence_length: {asked} is more than the base's {most} positions")
    return asked


def prepare_sft(
    section: SftSection, tokenizer: Any, length: int, seed: int, cache: Path, reporter: Reporter
) -> Conversations:
    """Read, tokenise and pack the conversations; what form they have and what is cut is said.

    Raises:
        DataError: a set is missing or malformed, or the chat template cannot be exact for it.
        RecipeError: two sets have one name.
    """
    labels = [one.label for one in section.data]
    for name in sorted({label for label in labels if labels.count(label) > 1}):
        raise RecipeError(f"sft.data: two sets are called {name}; give one of them another name")
    template = choose_template(tokenizer, section.template)
    corpora: list[ConversationCorpus] = []
    for asked in section.data:
        reporter.stage(f"reading conversations of {asked.label}")
        corpus = prepare_conversations(
            asked,
            tokenizer,
            template,
            length,
            cache=cache,
            progress=lambda done: reporter.progress(done, None, "conversations"),
        )
        for line in [*corpus.forms, f"{asked.label}: {corpus.counts.line()}"]:
            reporter.note(line)
        corpora.append(corpus)
    weighted = [(corpus, one.weight) for corpus, one in zip(corpora, section.data, strict=True)]
    return Conversations(
        template=template, corpora=corpora, mixture=mix_conversations(weighted, length, seed)
    )
