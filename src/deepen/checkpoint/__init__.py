"""Checkpoint directories as bytes: headers, shards, fingerprints, and output that is whole or absent.

No model knowledge, no torch.
"""

from deepen.checkpoint.atomic import atomic_directory, atomic_file, check_apart, check_free, write_file
from deepen.checkpoint.fingerprint import (
    CHUNK,
    combine_digests,
    fast_fingerprint,
    full_fingerprint,
    tensor_digest,
    tensor_reader,
    workers,
)
from deepen.checkpoint.header import (
    ITEM_BYTES,
    Shard,
    Tensor,
    byte_count,
    parse_json,
    read_json,
    read_shard,
    write_header,
)
from deepen.checkpoint.hub import is_repository, push_files, resolve_base, resolve_config
from deepen.checkpoint.store import CONFIG, INDEX, SINGLE, Checkpoint, contained, read_config
from deepen.checkpoint.values import decode, max_abs_difference, not_finite

__all__ = [
    "CHUNK",
    "CONFIG",
    "INDEX",
    "ITEM_BYTES",
    "SINGLE",
    "Checkpoint",
    "Shard",
    "Tensor",
    "atomic_directory",
    "atomic_file",
    "byte_count",
    "check_apart",
    "check_free",
    "combine_digests",
    "contained",
    "decode",
    "fast_fingerprint",
    "full_fingerprint",
    "is_repository",
    "max_abs_difference",
    "not_finite",
    "parse_json",
    "push_files",
    "read_config",
    "read_json",
    "read_shard",
    "resolve_base",
    "resolve_config",
    "tensor_digest",
    "tensor_reader",
    "workers",
    "write_file",
    "write_header",
]
