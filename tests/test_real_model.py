"""A real pretrained Llama on real text: what the examples promise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.blocks import extract_pack, merge_pack
from deepen.cli import main
from deepen.config import Recipe, load_recipe
from deepen.expansion import expand_checkpoint
from deepen.pipeline.run import run_recipe
from deepen.records import EvaluationRecord, read_record

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, data_dir: Path, output: Path, *settings: str) -> Recipe:
    """Load a shipped recipe with its data where the tests find it."""
    text = (EXAMPLES / name).read_text().replace("../shared/data", str(data_dir))
    moved = output.parent / name
    moved.write_text(text)
    return load_recipe(moved, [f"output={output}", f"data.cache={output.parent}/cache", *settings])


def greedy(directory: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = torch.tensor([[tokenizer.bos_token_id]])
    written = model.generate(start, max_new_tokens=80, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0])


@pytest.mark.filterwarnings("ignore")  # generation of transformers warns of its own defaults
def test_greedy_text_of_an_expanded_and_of_a_merged_model_is_the_bases(data_dir, tmp_path):
    base = data_dir / "models" / "stories260k"
    expand_checkpoint(base, tmp_path / "expanded", blocks=3)
    extract_pack(tmp_path / "expanded", tmp_path / "pack")
    merge_pack(base, tmp_path / "pack", tmp_path / "merged")
    text = greedy(base)
    assert text.startswith("<s> Once upon a time, there was a little girl named Lily.")
    assert greedy(tmp_path / "expanded") == text
    assert greedy(tmp_path / "merged") == text
    assert main(["verify", str(base), str(tmp_path / "merged"), "--logits"]) == 0


def test_the_example_learns_from_its_first_tokens(data_dir, tmp_path):
    recipe = example(
        "stories260k-gsm8k.yaml",
        data_dir,
        tmp_path / "run",
        "train.tokens=40960",
        "evaluate.max_tokens=4000",
        "train.evaluate_every=100",
    )
    result = run_recipe(recipe)
    learned, kept = losses(tmp_path / "run")
    assert learned.base_value == pytest.approx(5.7, abs=0.15)
    assert kept.base_value == pytest.approx(1.5, abs=0.12)
    assert learned.value < 4.0
    assert learned.ci_high < 0
    assert result.identity.identical
    assert result.audit.unchanged


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_reaches_its_figure(data_dir, tmp_path):
    run_recipe(example("stories260k-gsm8k.yaml", data_dir, tmp_path / "run"))
    learned, _ = losses(tmp_path / "run")
    assert learned.value <= 2.5


def losses(run: Path):
    record = read_record(run / "evaluation" / "heldout.json", EvaluationRecord)
    by_role = {metric.role: metric for metric in record.metrics if metric.metric == "nats_per_token"}
    return by_role["domain"], by_role["general"]
