"""Text by a model of its own: documents drawn from its distribution, token by token."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

# Tokens whose keys and values are held at a time.
_HELD_TOKENS = 32_768


def write_documents(
    model: PreTrainedModel,
    begin: Sequence[int],
    end: int,
    *,
    tokens: int,
    length: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """Yield documents that a model writes, each from its beginning to the end-of-text token or to `length`.

    Nothing is cut from the distribution (no top-k, no top-p). With the same device, precision and libraries
    the same arguments give the same documents; the random state outside is left as it was.

    Args:
        model: a causal LM.
        begin: ids that a document begins with; where there are none, one begins after `end`, as in a stream.
        end: the end-of-text token.
        tokens: how many to write in all, at least; the last document is kept whole.
        length: most tokens of a document.
        temperature: divides the logits.
        seed: of the draws.
        progress: called as `progress(written, tokens)`.
    """
    first = list(begin) or [end]
    rows = max(1, min(_HELD_TOKENS // length, -(-tokens // length)))
    prompt = torch.tensor([first] * rows, device=model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_length=length if begin else length + 1,
        bos_token_id=first[0],
        eos_token_id=end,
        pad_token_id=end,
    )
    training, own, batch, done = model.training, model.generation_config, 0, 0
    model.eval()
    model.generation_config = (
        GenerationConfig()
    )  # what the files say of penalties and the like is not drawn from
    try:
        while done < tokens:
            for ids in _draw(model, prompt, config, (seed, batch)):
                document = _trimmed(ids if begin else ids[1:], end, len(begin))
                done += len(document)
                yield document
                if done >= tokens:
                    break
            batch += 1
            if progress:
                progress(min(done, tokens), tokens)
    finally:
        model.train(training)
        model.generation_config = own


@torch.no_grad()
def _draw(
    model: PreTrainedModel, prompt: torch.Tensor, config: GenerationConfig, seed: tuple[int, int]
) -> list[list[int]]:
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    drawn: list[list[int]] = found.tolist()
    return drawn


def _trimmed(ids: list[int], end: int, begin: int) -> list[int]:
    """Return a document up to its end; what it begins with may hold the same token."""
    return ids[: ids.index(end, begin) + 1] if end in ids[begin:] else ids
