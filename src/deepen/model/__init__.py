"""The live model: insert new blocks, attach packs, switch, freeze the base, identity. Here torch begins."""

from deepen.model.classifier import Classifier, fit_classifier, pooled_states
from deepen.model.damp import damped
from deepen.model.decision import Decider, Decision, Likelihood, Switch, mean_log_likelihood, playing
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
from deepen.model.switch_file import SWITCH_NAME, pack_digest, read_switch, recorded_packs, write_switch
from deepen.model.switched import decisions, find_switch, set_switch, switch_of
from deepen.model.tensors import save_tensors

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "SWITCH_NAME",
    "Classifier",
    "Decider",
    "Decision",
    "Likelihood",
    "LogitsComparison",
    "Switch",
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
    "decisions",
    "detach",
    "expansion_of",
    "file_dtypes",
    "find_expansion",
    "find_switch",
    "fit_classifier",
    "freeze_base",
    "insert_blocks",
    "live_fingerprint",
    "load",
    "load_quantised",
    "mean_log_likelihood",
    "model_tensors",
    "new_parameters",
    "new_tensors",
    "pack_digest",
    "packed_fingerprint",
    "packed_layers",
    "parameter_dtypes",
    "playing",
    "pooled_states",
    "probe_logits",
    "read_switch",
    "recorded_packs",
    "save_blocks",
    "save_tensors",
    "set_switch",
    "settle_base",
    "switch_of",
    "train_rows",
    "trainable_parameters",
    "write_switch",
]
