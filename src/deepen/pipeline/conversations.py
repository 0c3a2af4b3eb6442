"""The conversations a recipe tunes on, tokenised and mixed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.config import SftSection
from deepen.data.batches import Mixture
from deepen.data.chat import ChatTemplate, choose_template
from deepen.data.conversation_build import mix_conversations, prepare_conversations
from deepen.data.conversation_corpus import ConversationCorpus
from deepen.data.evaluation_text import EvaluationText, score_answers
from deepen.errors import RecipeError
from deepen.pipeline.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """What is tuned on.

    Attributes:
        labels: names of the sets.
        template: how messages become one text.
        corpora: one a set.
        mixture: where batches come from.
    """

    labels: list[str]
    template: ChatTemplate
    corpora: list[ConversationCorpus]
    mixture: Mixture

    def heldout(self, tokenizer: Any, max_tokens: int) -> list[EvaluationText]:
        """Return the conversations kept out of tuning, to have their answers scored."""
        return [
            score_answers(held.documents_read(), tokenizer, task=f"{label}-heldout", max_tokens=max_tokens)
            for label, corpus in zip(self.labels, self.corpora, strict=True)
            if (held := corpus.heldout)
        ]


def prepare_sft(
    section: SftSection, tokenizer: Any, length: int, cache: Path, reporter: Reporter
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
            heldout=section.heldout,
            progress=lambda done: reporter.progress(done, None, "conversations"),
        )
        for line in [*corpus.forms, f"{asked.label}: {corpus.counts.line()}", *_kept_out(corpus)]:
            reporter.note(line)
        corpora.append(corpus)
    weighted = [(corpus, one.weight) for corpus, one in zip(corpora, section.data, strict=True)]
    return Conversations(
        labels=labels,
        template=template,
        corpora=corpora,
        mixture=mix_conversations(weighted, length, section.seed),
    )


def _kept_out(corpus: ConversationCorpus) -> list[str]:
    return [f"kept out of tuning: {held.counts.line()}"] if (held := corpus.heldout) else []
