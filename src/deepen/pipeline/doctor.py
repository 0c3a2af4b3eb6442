"""What this installation and this machine have, what a run would use, and what is missing."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from deepen.pipeline.texts import default_cache
from deepen.planner.devices import this_device
from deepen.planner.report import SPEED_FILE
from deepen.planner.speed import read_speed
from deepen.training.recompute import available_memory

_NEEDED: Final = ("deepen", "torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "numpy")
# Package -> what it is for, and what installs it.
_OPTIONAL: Final = {
    "bitsandbytes": ("a base in 4 or 8 bits, 8-bit Adam", "pip install 'deepen[quantised]'"),
    "accelerate": ("a base in 4 or 8 bits", "pip install 'deepen[quantised]'"),
    "lm_eval": ("benchmarks", "pip install 'deepen[eval]'"),
    "liger_kernel": ("train.loss: liger, on a GPU", "pip install 'deepen[liger]'"),
    "vllm": ("evaluate --backend vllm, on a GPU", "pip install vllm"),
    "gradio": ("chat --web", "pip install 'deepen[web]'"),
    "gguf": ("export gguf", "pip install 'deepen[gguf]'"),
    "trl": ("training by TRL from Python", "pip install trl"),
    "tensorboard": ("train.log: tensorboard", "pip install tensorboard"),
    "trackio": ("train.log: trackio", "pip install trackio"),
    "wandb": ("train.log: wandb", "pip install wandb"),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """An optional package.

    Attributes:
        name: as Python imports it.
        use: what it is for.
        version: installed; None where it is missing.
        install: the command that gets it.
    """

    name: str
    use: str
    version: str | None
    install: str


def examine() -> dict[str, Any]:
    """Look at everything; what cannot be looked at says why, and nothing fails."""
    probes: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "devices": _devices,
        "used": _used,
        "kernels": _kernels,
        "memory": _memory,
        "disk": _disk,
        "sandbox": _sandbox,
        "packages": _packages,
        "caches": _caches,
        "calibration": _calibration,
    }
    return {name: _attempt(probe) for name, probe in probes.items()}


def _attempt(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a doctor does not die of what it finds
        return {"unknown": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return found | {name: _version(name) or "missing" for name in _NEEDED}


def _version(name: str) -> str | None:
    for known in (name, name.replace("_", "-")):
        try:
            return version(known)
        except PackageNotFoundError:
            continue
    return "present" if importlib.util.find_spec(name) else None


def _devices() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
    ]
    for index in range(torch.cuda.device_count()):
        held = torch.cuda.get_device_properties(index)
        rows.append({"device": f"cuda:{index}", "name": held.name, "bytes": held.total_memory})
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": "Apple GPU", "bytes": None})
    return rows


def _used() -> dict[str, str]:
    device = this_device()
    return {"device": device.name, "precision": "fp32" if device.kind == "cpu" else "bf16"}


def _kernels() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    fused = torch.backends.cuda.flash_sdp_enabled() if cuda else True  # type: ignore[no-untyped-call]
    bf16 = torch.cuda.is_bf16_supported() if cuda else _cpu_bf16()
    return {
        "attention": f"sdpa, {'fused' if fused else 'not fused'}",
        "flash_attn": _version("flash_attn") or "not installed (sdpa has its own)",
        "bf16": "yes" if bf16 else "slow: the processor has no instructions for it" if not cuda else "no",
        "compile": "yes" if shutil.which("cc") or shutil.which("gcc") else "no C compiler",
    }


def _cpu_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(info.read_text().split()))


def _memory() -> dict[str, int]:
    return {"available": available_memory(torch.device("cpu"))}


def _disk() -> dict[str, int]:
    return {"here": shutil.disk_usage(".").free, "cache": shutil.disk_usage(_existing(default_cache())).free}


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _sandbox() -> dict[str, str]:
    from deepen.evaluation.sandbox import try_layers

    found = try_layers()
    layers = {layer.name: "holds" if layer.holds else f"absent: {layer.why_not}" for layer in found.layers}
    return layers | {"left open": ", ".join(found.missing) or "nothing"}


def _packages() -> list[Package]:
    return [
        Package(name=name, use=use, version=_version(name), install=command)
        for name, (use, command) in _OPTIONAL.items()
    ]


def _caches() -> dict[str, str]:
    hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return {"deepen": str(default_cache()), "hub": str(hub)}


def _calibration() -> dict[str, Any] | None:
    device = this_device()
    speed = read_speed(default_cache() / SPEED_FILE, device, "fp32" if device.kind == "cpu" else "bf16")
    return vars(speed) if speed else None
