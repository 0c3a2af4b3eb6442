"""The live model: insert new blocks, attach packs, switch, freeze the base, identity. Here torch begins."""

from deepen.model.damp import damped
from deepen.model.dtypes import DTYPE_NAMES, DTYPES, file_dtypes, parameter_dtypes
from deepen.model.fingerprint import (
    base_fingerprint,
    base_names,
    base_tensors,
    live_fingerprint,
    model_tensors,
    packed_fingerprint,
)
from deepen.model.freeze import freeze_base, train_rows, trainable_parameters
from deepen.model.identity import LogitsComparison, compare_logits, compare_probes, probe_logits
from deepen.model.insert import insert_blocks
from deepen.model.pack import load, save_blocks
from deepen.model.packed import packed_layers
from deepen.model.quantised import check_quantisation, load_quantised
from deepen.model.record import expansion_of, find_expansion, new_parameters, new_tensors
from deepen.model.state import settle_base
from deepen.model.switch import activate, attach, attached, bypass, detach
from deepen.model.tensors import save_tensors

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "LogitsComparison",
    "activate",
    "attach",
    "attached",
    "base_fingerprint",
    "base_names",
    "base_tensors",
    "bypass",
    "check_quantisation",
    "compare_logits",
    "compare_probes",
    "damped",
    "detach",
    "expansion_of",
    "file_dtypes",
    "find_expansion",
    "freeze_base",
    "insert_blocks",
    "live_fingerprint",
    "load",
    "load_quantised",
    "model_tensors",
    "new_parameters",
    "new_tensors",
    "packed_fingerprint",
    "packed_layers",
    "parameter_dtypes",
    "probe_logits",
    "save_blocks",
    "save_tensors",
    "settle_base",
    "train_rows",
    "trainable_parameters",
]
