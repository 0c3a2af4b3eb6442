"""GGUF files, read by llama.cpp itself."""

import json
import math
import shutil
import stat

import numpy as np
import pytest
import torch
import transformers
from conftest import write_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import deepen
from deepen.cli import main
from deepen.demo.demo import BASE
from deepen.errors import CheckpointError, FamilyError, OutputError

gguf = pytest.importorskip("gguf", reason="needs deepen[gguf]")

from deepen.export.gguf import export_gguf  # noqa: E402
from deepen.export.gguf_metadata import rotary_factors  # noqa: E402

VOCABULARY = 2048
TEXT = "def add(a, b):\n    # 42 things, isn't it?\n    return  a + b\n"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama-biased-tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


class Running:
    """A GGUF file in llama.cpp."""

    def __init__(self, path):
        llama = pytest.importorskip("xllamacpp", reason="needs llama.cpp's binding")
        wanted = llama.CommonParams()
        wanted.model.path = str(path)
        wanted.n_ctx, wanted.n_parallel, wanted.warmup, wanted.verbosity = 256, 1, False, -1
        wanted.cpuparams.n_threads = 1
        self.server = llama.Server(wanted)

    def complete(self, prompt, count, probabilities=0):
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": probabilities}
        found = self.server.handle_completions({**asked, "post_sampling_probs": False, "cache_prompt": False})
        return found["choices"][0]

    def greedy(self, prompt, count):
        content = self.complete(prompt, count, 1)["logprobs"]["content"]
        return [token["top_logprobs"][0]["id"] for token in content]

    def log_probabilities(self, tokens):
        """Of every token of the vocabulary after `tokens`."""
        content = self.complete(list(map(int, tokens)), 1, VOCABULARY)["logprobs"]["content"][0]
        return {token["id"]: token["logprob"] for token in content["top_logprobs"]}


def write_model(directory, kind, seed=0, dtype=torch.float32, **fields):
    """A tiny real model with the embedded base's tokenizer, every weight perturbed."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, directory / name)
    return directory


def reference(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    kind, fields = MODELS[name]
    base = write_model(tmp_path / "model", kind, **fields)
    result = export_gguf(str(base), tmp_path / "model.gguf")
    assert result.type == "f32"
    tokens = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    found = Running(tmp_path / "model.gguf").log_probabilities(tokens)
    expected = reference(base, tokens)[-1]
    assert len(found) == VOCABULARY
    for number, value in found.items():
        assert value == pytest.approx(expected[number].item(), abs=2e-3)


def test_greedy_text_of_an_untrained_expansion_is_the_bases(tmp_path):
    expanded = tmp_path / "expanded"
    deepen.expand_checkpoint(BASE, expanded, blocks=3)
    texts = []
    for model in (BASE, expanded):
        path = tmp_path / f"{model.name}.gguf"
        assert export_gguf(str(model), path).type == "bf16"
        texts.append(Running(path).greedy(TEXT, 24))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 24


@pytest.mark.parametrize(("type", "near"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.05)])
def test_precisions(type, near, tmp_path):
    base = write_model(tmp_path / "model", "Llama")
    result = export_gguf(str(base), tmp_path / "model.gguf", type=type)
    tokens = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    found = Running(tmp_path / "model.gguf").log_probabilities(tokens)
    expected = reference(base, tokens)[-1]
    assert max(abs(value - expected[number].item()) for number, value in found.items()) < near
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {"F32", type.upper()}
    assert result.bytes_written < 1.2 * sum(f.stat().st_size for f in base.glob("*.safetensors")) / 2


def pack_on(base, directory, blocks):
    """A pack of a base whose new blocks do something."""
    model = deepen.load(base)
    deepen.insert_blocks(model, deepen.plan_layout(len(model.model.layers), blocks=blocks), base=str(base))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".o_proj." in name or ".down_proj." in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    # The base's own blocks are not saved: what is evaluated is base and pack.
    return deepen.save_blocks(model, directory)


def test_a_pack_has_our_perplexity(tmp_path, data_dir):
    base = data_dir / "models" / "stories260k"
    pack = pack_on(base, tmp_path / "pack", blocks=5)
    export_gguf(str(pack), tmp_path / "model.gguf", type="f16")
    model, tokenizer = deepen.load(base, pack), AutoTokenizer.from_pretrained(base)
    text = (data_dir / "text" / "tinystories.txt").read_text()[:600]
    tokens = tokenizer(text)["input_ids"][:160]
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    running = Running(tmp_path / "model.gguf")
    theirs = [running.log_probabilities(tokens[:at])[tokens[at]] for at in range(1, len(tokens), 4)]
    nll = -sum(theirs) / len(theirs)
    expected = -sum(ours[at - 1, tokens[at]].item() for at in range(1, len(tokens), 4)) / len(theirs)
    assert math.exp(nll) == pytest.approx(math.exp(expected), rel=0.01)
    # The pack does something, so that this could fail: the base alone is elsewhere.
    export_gguf(str(base), tmp_path / "base.gguf", type="f16")
    alone = Running(tmp_path / "base.gguf")
    base_nll = -sum(alone.log_probabilities(tokens[:at])[tokens[at]] for at in range(1, 40, 4)) / 10
    assert abs(base_nll + sum(theirs[:10]) / 10) > 0.05


def test_text_is_cut_as_transformers_cuts_it(tmp_path, data_dir):
    """Greedy continuations of texts given as text, not as tokens, are those of transformers."""
    base = data_dir / "models" / "stories260k"
    export_gguf(str(base), tmp_path / "model.gguf")
    running = Running(tmp_path / "model.gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for text in ("Once upon a time", "Lily  saw\n3 Hündchen! 你好", "  and then"):
        inputs = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :]
        assert running.greedy(text, 12)[: len(expected)] == expected.tolist()


def test_a_run_is_exported_by_its_directory(tmp_path):
    base = write_tiny_llama(tmp_path / "base", vocab_size=VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, base / name)
    pack_on(base, tmp_path / "run" / "blocks", blocks=2)
    (tmp_path / "run" / "result.json").write_text(json.dumps(RESULT | {"base": str(base)}))
    result = export_gguf(str(tmp_path / "run"), tmp_path / "run.gguf")
    reader = gguf.GGUFReader(tmp_path / "run.gguf")
    assert reader.get_field("llama.block_count").contents() == 6
    assert result.tensors == len(reader.tensors)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    mask = stat.S_IMODE((tmp_path / "run.gguf").stat().st_mode)
    assert mask == stat.S_IMODE((tmp_path / "run" / "result.json").stat().st_mode)


RESULT = {
    "format_version": 1,
    "method": "blocks",
    "layout": "",
    "parameters": {"base": 1, "new": 1, "trainable": 1},
    "steps": 1,
    "tokens": 1,
    "seconds": 1.0,
    "identity": None,
    "audit": None,
    "outputs": ["blocks"],
}


def test_rotary_factors_are_transformers(tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    size = config.head_dim
    plain = 1 / (500000.0 ** (torch.arange(0, size, 2) / size))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(rotary_factors(config), (plain / scaled).numpy(), rtol=1e-6)


def gemma(directory, blocks):
    return write_model(directory, "Gemma2", head_dim=16, num_hidden_layers=blocks)


def test_kinds_that_llama_cpp_would_take_from_the_number(tmp_path):
    """One new block in the middle shifts the sliding pattern; two in whole periods do not."""
    base = gemma(tmp_path / "base", 4)
    deepen.expand_checkpoint(base, tmp_path / "shifted", after=[0])
    with pytest.raises(CheckpointError, match=r"layer_types: not what llama.cpp works out"):
        export_gguf(str(tmp_path / "shifted"), tmp_path / "model.gguf")
    deepen.expand_checkpoint(base, tmp_path / "whole", blocks=2, placement="suffix")
    with pytest.raises(FamilyError, match="model_type gemma2; llama"):
        export_gguf(str(tmp_path / "whole"), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_llama_cpps_own_converter(tmp_path):
    base = gemma(tmp_path / "base", 4)
    converter = tmp_path / "convert.py"
    converter.write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))")
    export_gguf(str(base), tmp_path / "model.gguf", type="bf16", converter=converter)
    said = (tmp_path / "model.gguf").read_text().split()
    assert said[0] == str(base)
    assert said[3:] == ["--outtype", "bf16"]
    converter.write_text("import sys; sys.exit('ERROR: unknown tokenizer')")
    with pytest.raises(CheckpointError, match="converter failed: ERROR: unknown tokenizer"):
        export_gguf(str(base), tmp_path / "other.gguf", converter=converter)
    with pytest.raises(CheckpointError, match="no such file"):
        export_gguf(str(base), tmp_path / "other.gguf", converter=tmp_path / "absent.py")
    assert not (tmp_path / "other.gguf").exists()


def test_numbers_beyond_float16(tmp_path):
    base = write_model(tmp_path / "model", "Llama", dtype=torch.bfloat16)
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: 999424 is beyond float16"):
        export_gguf(str(base), tmp_path / "model.gguf", type="f16")
    assert export_gguf(str(base), tmp_path / "model.gguf").type == "bf16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, "Unigram, not BPE"),
    ],
    ids=["cut", "unigram"],
)
def test_tokenizers_llama_cpp_does_not_have(change, said, tmp_path):
    base = write_model(tmp_path / "model", "Llama")
    content = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=said) as caught:
        export_gguf(str(base), tmp_path / "model.gguf")
    assert str(caught.value).count("\n") <= 1


def test_outputs_are_not_overwritten_unasked(tmp_path, capsys):
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(str(BASE), out)
    with pytest.raises(OutputError, match="does not exist"):
        export_gguf(str(BASE), tmp_path / "absent" / "model.gguf")
    assert out.read_text() == "mine"
    assert main(["export", "gguf", str(BASE), str(out), "--overwrite", "--type", "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_written"] == out.stat().st_size
