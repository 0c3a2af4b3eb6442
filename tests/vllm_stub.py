"""vLLM's names over a transformers model: what `deepen evaluate --backend vllm` asks of it, and no more.

Names and meanings are those of vLLM. Each prompt is continued alone, one token after the other.
"""

import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__version__ = "0.stub"


def TokensPrompt(prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list = field(default_factory=list)
    stop_token_ids: list = field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    max_tokens: int | None = 16


class LLM:
    alive: ClassVar = weakref.WeakSet()
    started: ClassVar = []
    asked: ClassVar = []

    def __init__(
        self, model, *, dtype, seed, generation_config, trust_remote_code, tensor_parallel_size=1
    ):  # vLLM has many more; an unknown one is a TypeError there as well
        if LLM.alive:
            raise RuntimeError("no GPU memory is left for a second engine")
        assert (dtype, generation_config, trust_remote_code) == ("auto", "vllm", False)
        if tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size}: there is one GPU")
        LLM.alive.add(self)
        LLM.started.append(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(self, prompts, sampling_params, use_tqdm):
        LLM.asked += sampling_params
        both = zip(prompts, sampling_params, strict=True)
        written = [self._continue(prompt["prompt_token_ids"], how) for prompt, how in both]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in written]

    @torch.no_grad()
    def _continue(self, prompt, how):
        generator = torch.Generator().manual_seed(how.seed or 0)
        ids = list(prompt)
        while len(ids) - len(prompt) < how.max_tokens:
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            if how.temperature:
                chances = torch.softmax(logits / how.temperature, dim=-1)
                ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            else:
                ids.append(int(logits.argmax()))
            text = self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=how.skip_special_tokens)
            if ids[-1] in how.stop_token_ids or any(stop in text for stop in how.stop):
                break
        return ids[len(prompt) :]
