"""The live model: insert new blocks, freeze the base, bypass, packs, identity. Here torch begins."""

from deepen.model.bypass import bypass
from deepen.model.dtypes import DTYPE_NAMES, DTYPES, file_dtypes
from deepen.model.fingerprint import base_fingerprint, base_tensors
from deepen.model.freeze import freeze_base, trainable_parameters
from deepen.model.identity import LogitsComparison, compare_logits, compare_probes, probe_logits
from deepen.model.insert import insert_blocks
from deepen.model.pack import load, save_blocks
from deepen.model.record import attach_record, expansion_of, find_expansion, new_parameters
from deepen.model.tensors import save_tensors

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "LogitsComparison",
    "attach_record",
    "base_fingerprint",
    "base_tensors",
    "bypass",
    "compare_logits",
    "compare_probes",
    "expansion_of",
    "file_dtypes",
    "find_expansion",
    "freeze_base",
    "insert_blocks",
    "load",
    "new_parameters",
    "probe_logits",
    "save_blocks",
    "save_tensors",
    "trainable_parameters",
]
