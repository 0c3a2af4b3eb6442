"""The cache of what lies below the first block that trains: where it lies, and what it may be shared with."""

from importlib.metadata import version

import torch

from deepen.data.batches import Mixture
from deepen.data.tokens import digest_of
from deepen.errors import TrainingError
from deepen.expansion import check_space
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.texts import corpus_cache
from deepen.pipeline.trainee import Trainee
from deepen.training.prefix import Prefix, PrefixCache, find_prefix
from deepen.training.prefix_file import PrefixFile, file_bytes
from deepen.training.world import World

_FORMAT_VERSION = 1


def open_prefix(
    plan: RunPlan, trainee: Trainee, mixture: Mixture, world: World, reporter: Reporter
) -> PrefixCache | None:
    """Open the cache that `train.prefix_cache` asks for: `CACHE/prefixes/KEY.states`.

    KEY hashes all that decides the states of a window: base, depth, texts and their packing, precision,
    device and libraries. So a run with another learning rate or order finds what an earlier one left.

    Raises:
        TrainingError: there is nothing to cache, or it cannot be passed by.
        OutputError: the disk cannot hold it.
    """
    if plan.train.prefix_cache == "none":
        return None
    if world.size > 1:
        raise TrainingError(
            f"train.prefix_cache: serves a run of one process, this one has {world.size}\n"
            "set train.prefix_cache to none"
        )
    prefix = find_prefix(trainee.model, trainee.autocast)
    path = corpus_cache(plan.recipe) / "prefixes" / f"{_key(plan, trainee, mixture, prefix)[:32]}.states"
    shape = (plan.length, *prefix.width)
    windows = sum(mixture.sizes)
    size = file_bytes(windows, shape, prefix.dtype)
    taken = path.stat().st_blocks * 512 if path.exists() else 0
    check_space(path, max(0, size - taken))
    file = PrefixFile(path, windows, shape, prefix.dtype)
    reporter.note(
        f"the lower {prefix.depth} of {len(prefix.blocks)} blocks are run once a window: {file.held:,} of "
        f"{windows:,} windows ({size / 1e6:,.1f} MB in all) are in {path}"
    )
    return PrefixCache(prefix, file)


def _key(plan: RunPlan, trainee: Trainee, mixture: Mixture, prefix: Prefix) -> str:
    model, device = trainee.model, trainee.model.device
    below = (parameter.dtype for block in prefix.blocks[: prefix.depth] for parameter in block.parameters())
    return digest_of(
        {
            "format": _FORMAT_VERSION,
            "base": plan.fingerprint,
            "depth": prefix.depth,
            "windows": mixture.windows_digest,
            "precision": [str(each) for each in (trainee.autocast, prefix.dtype, model.dtype)],
            "weights": sorted({str(dtype) for dtype in below}),
            "quantised": str(getattr(model.config, "quantization_config", None)),
            "attention": str(model.config._attn_implementation),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "libraries": [version(name) for name in ("torch", "transformers")],
        }
    )
