"""Two tokenizers over the same texts: how many tokens, and whether the new one only joins the old one's."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, Final

from deepen.errors import CheckFailed
from deepen.vocabulary.corpus import Digest, Text
from deepen.vocabulary.record import MeasuredText
from deepen.vocabulary.words import characters

_DOCUMENTS: Final = 64
_SHOWN: Final = 60


def measure_text(text: Text, old: Any, new: Any, added: Collection[str]) -> MeasuredText:
    """Tokenise a text with both tokenizers and prove, document by document, what is guaranteed.

    Args:
        text: what to read.
        old: the base's `tokenizers.Tokenizer`.
        new: the extended one.
        added: the new pieces.

    Raises:
        CheckFailed: a document's tokens are not the old ones with runs of them joined to new pieces, or its
            text does not come back from them as before.
    """
    digest, sums = Digest(), Counter[str]()
    documents = digest.through(text.documents())
    while some := list(islice(documents, _DOCUMENTS)):
        before, after = (each.encode_batch(some, add_special_tokens=False) for each in (old, new))
        back = [
            each.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
            for each, encodings in ((old, before), (new, after))
        ]
        for number, (was, now) in enumerate(zip(before, after, strict=True)):
            if back[0][number] != back[1][number] or not is_joined(was.tokens, now.tokens, added):
                raise _other(text, some[number])
            sums += Counter(
                documents=1,
                documents_changed=int(was.ids != now.ids),
                characters=len(some[number]),
                tokens_before=len(was.ids),
                tokens_after=len(now.ids),
            )
    return MeasuredText(path=text.path, learned=text.learned, digest=digest.hex(), **sums)


def is_joined(old: Iterable[str], new: Iterable[str], added: Collection[str]) -> bool:
    """Return whether `new` is `old` with runs of tokens joined to added pieces, and nothing else."""
    rest = characters(old)
    for token in characters(new):
        held = next(rest, "")
        while token in added and len(held) < len(token) and (part := next(rest, "")):
            held += part
        if held != token:
            return False
    return next(rest, None) is None


def _other(text: Text, document: str) -> CheckFailed:
    shown = document[:_SHOWN] + ("…" if len(document) > _SHOWN else "")
    return CheckFailed(
        f"{text.path}: the extended tokenizer does more to the document {shown!r} than to join tokens;\n"
        "nothing was written: its kind of tokenizer cannot be extended exactly"
    )
