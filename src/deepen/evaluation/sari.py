"""SARI, a score of simplified text (Xu et al., TACL 4, 2016), as Hugging Face's `evaluate` computes it.

No package on PyPI computes it without fetching code from the hub, so it is here. Two things differ from the
paper's own script, in `evaluate` as here: 0/0 counts as 1, and the recall of what is kept is over all that
should be, not over kinds of n-grams. Text is lower-cased and tokenised by sacrebleu's 13a.
"""

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from statistics import fmean
from typing import Final

_LONGEST: Final = 4


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """Return SARI of one answer, from 0 to 1.

    The mean of the F1 of what is added, the F1 of what is kept and the precision of what is deleted, each
    the mean over n-grams of 1 to 4 words.

    Args:
        source: the text to simplify.
        answer: what was made of it.
        references: what should have been; one at least.
    """
    tokenize = import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    source, answer, *wanted = (tokenize(text.lower()) for text in (source, answer, *references))
    return fmean(
        _operations(
            _grams(source, n),
            _grams(answer, n),
            sum((_grams(each, n) for each in wanted), Counter()),
            len(wanted),
        )
        for n in range(1, _LONGEST + 1)
    )


def _grams(text: str, n: int) -> Counter[str]:
    words = text.split(" ")
    return Counter(" ".join(words[at : at + n]) for at in range(len(words) - n + 1))


def _operations(source: Counter[str], answer: Counter[str], wanted: Counter[str], references: int) -> float:
    """Return the mean score of keeping, deleting and adding n-grams of one length."""
    had, has = _times(source, references), _times(answer, references)
    kept, to_keep = had & has, had & wanted
    well_kept = kept & wanted
    keeping = _f1(_mean_share(well_kept, kept), _share(well_kept.total(), to_keep.total()))
    deleted = had - has
    deleting = _mean_share(deleted - wanted, deleted)
    added, to_add = answer.keys() - source.keys(), wanted.keys() - source.keys()
    well_added = len(added & to_add)
    adding = _f1(_share(well_added, len(added)), _share(well_added, len(to_add)))
    return (keeping + deleting + adding) / 3


def _times(grams: Counter[str], factor: int) -> Counter[str]:
    return Counter({gram: count * factor for gram, count in grams.items()})


def _mean_share(good: Counter[str], of: Counter[str]) -> float:
    return fmean(good[gram] / count for gram, count in of.items()) if of else 1.0


def _share(good: int, of: int) -> float:
    return good / of if of else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
