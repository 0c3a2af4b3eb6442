"""vLLM in the place of a transformers model, for what is generated.

It answers transformers' `generate`, so prompts, stop sequences and the ends of texts are decided where they
are for a model of transformers. vLLM loads ordinary checkpoints and switches no new blocks off: a model and
its base are two engines. One is alive at a time, since each takes most of a GPU's memory.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoConfig, GenerationConfig

from deepen.errors import EvaluationError, in_a_line
from deepen.evaluation.memory import collect_memory

# What transformers takes where neither the model nor the caller says.
_TEMPERATURE, _TOP_K, _TOP_P, _PENALTY = 1.0, 50, 1.0, 1.0
# Settings that would be passed over, and what they are where they do nothing.
_UNKNOWN: Final = MappingProxyType(
    {
        "num_beams": 1,
        "num_return_sequences": 1,
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "min_new_tokens": 0,
    }
)


class VllmEngines:
    """Engines of vLLM, of which one is alive at a time."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Start nothing yet.

        Args:
            options: arguments of `vllm.LLM`, such as `tensor_parallel_size` and `gpu_memory_utilization`.

        Raises:
            EvaluationError: vLLM is not installed.
        """
        self._vllm = _package()
        self._options = dict(options)
        self._directory: Path | None = None
        self._engine: Any = None

    @property
    def version(self) -> str:
        """Of vLLM."""
        return str(getattr(self._vllm, "__version__", "unknown"))

    def write(
        self, directory: Path, prompts: Sequence[list[int]], sampling: Sequence[Mapping[str, Any]]
    ) -> list[list[int]]:
        """Return the tokens written after each prompt.

        Args:
            directory: of the checkpoint that writes.
            prompts: token ids.
            sampling: the arguments of `vllm.SamplingParams` for each.

        Raises:
            EvaluationError: vLLM cannot load the checkpoint, or fails.
        """
        self._start(directory)
        vllm = self._vllm
        try:
            found = self._engine.generate(
                [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
                sampling_params=[vllm.SamplingParams(**each) for each in sampling],
                use_tqdm=False,
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise EvaluationError(f"vLLM cannot generate: {in_a_line(error, 300)}") from None
        return [list(each.outputs[0].token_ids) for each in found]

    def release(self) -> None:
        """End the engine that is alive; its memory is free for another model."""
        self._engine = self._directory = None
        collect_memory()

    def _start(self, directory: Path) -> None:
        if directory == self._directory:
            return
        self.release()
        try:
            # Its sampling defaults come from us alone; weights stay in the precision of their files.
            defaults = {"dtype": "auto", "seed": 0, "generation_config": "vllm", "trust_remote_code": False}
            self._engine = self._vllm.LLM(model=str(directory), **{**defaults, **self._options})
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise EvaluationError(f"{directory}: vLLM cannot load it: {in_a_line(error, 300)}") from None
        self._directory = directory


class VllmModel:
    """A checkpoint that vLLM runs, as a `deepen.evaluation.generation.Generator`."""

    def __init__(self, directory: Path, engines: VllmEngines) -> None:
        """Read the configs; the engine starts when something is to be written."""
        self._directory, self._engines = directory, engines
        self.config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        held = (directory / "generation_config.json").is_file()
        read = GenerationConfig.from_pretrained if held else GenerationConfig.from_model_config
        self.generation_config: GenerationConfig = read(str(directory) if held else self.config)

    @property
    def device(self) -> torch.device:
        """Where token ids go: vLLM takes them as lists."""
        return torch.device("cpu")

    def generate(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Continue each row; see `Generator`.

        Raises:
            EvaluationError: vLLM fails, or the generation config asks what it is not asked here.
        """
        # The harness's own criteria hold the texts to stop at.
        criteria = options.pop("stopping_criteria", None) or ()
        stop = [each.sequence for each in criteria]
        config = self._resolved(options)
        width = input_ids.shape[1]
        rows = zip(input_ids, attention_mask, strict=True)
        prompts = [ids[mask.bool()].tolist() for ids, mask in rows]
        common = _sampling(config, width, [*stop, *(config.stop_strings or ())])
        written = self._engines.write(
            self._directory, prompts, [{**common, "seed": _seed(config)} for _ in prompts]
        )
        longest = max(map(len, written))
        pad = config.pad_token_id or 0
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in written], dtype=torch.long)
        return torch.cat([input_ids, padded.reshape(len(prompts), longest)], dim=1)

    def _resolved(self, options: dict[str, Any]) -> GenerationConfig:
        """As transformers does: what is asked, then what the model says."""
        config: GenerationConfig = deepcopy(options.pop("generation_config", None)) or GenerationConfig()
        config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**options)
        for name, neutral in _UNKNOWN.items():
            if getattr(config, name, None) not in (None, neutral):
                raise EvaluationError(
                    f"vLLM: `{name}` of the generation config is not passed on; use --backend transformers"
                )
        return config


def _sampling(config: GenerationConfig, width: int, stop: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `vllm.SamplingParams` but for the seed."""
    ends = config.eos_token_id
    most = config.max_new_tokens or int(config.max_length) - width
    sampled = {
        "temperature": _given(config.temperature, _TEMPERATURE),
        "top_p": _given(config.top_p, _TOP_P),
        "top_k": _given(config.top_k, _TOP_K),
        "min_p": _given(config.min_p, 0.0),
    }
    return {
        **(sampled if config.do_sample else {"temperature": 0.0}),
        "n": 1,
        "max_tokens": most,
        "repetition_penalty": _given(config.repetition_penalty, _PENALTY),
        "stop": list(stop),
        # Texts end at these and no other tokens, as in transformers; a stop sequence may name a special one.
        "stop_token_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }


def _seed(config: GenerationConfig) -> int | None:
    """One a row, from torch's generator: samples of one prompt differ, and a seeded run repeats itself."""
    return int(torch.randint(2**31, (1,))) if config.do_sample else None


def _given(value: Any, otherwise: float) -> Any:
    return otherwise if value is None else value


def _package() -> Any:
    try:
        return import_module("vllm")
    except ImportError:
        raise EvaluationError(
            "--backend vllm: vLLM is not installed\npip install vllm, or use --backend transformers"
        ) from None
