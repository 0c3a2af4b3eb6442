"""`--backend vllm` against a stub of vLLM's names: the same greedy answers as transformers, to the letter."""

import json
import sys

import pytest
import torch
import vllm_stub
from suite_tasks import write_own_tasks
from tiny_run import write_base, write_trained_pack
from transformers import AutoTokenizer, GenerationConfig

import deepen
from deepen.blocks import merge_pack
from deepen.cli import main
from deepen.errors import EvaluationError
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.chat.messages import assistant, user
from deepen.evaluation.vllm_model import VllmEngines, VllmModel

pytest.importorskip("lm_eval", reason="benchmarks need deepen[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base, a pack on it that is not the identity, both merged, and tasks."""
    root = tmp_path_factory.mktemp("vllm")
    write_base(root / "base", max_position_embeddings=256)
    write_own_tasks(root / "tasks")
    write_trained_pack(root / "base", root / "pack")
    merge_pack(root / "base", root / "pack", root / "expanded")
    return root


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub)
    vllm_stub.LLM.started.clear()
    vllm_stub.LLM.asked.clear()
    return vllm_stub.LLM


def evaluate(place, out, *options, target="expanded", tasks=("writing", "choice")):
    asked = [part for task in tasks for part in ("--task", place / "tasks" / f"{task}.yaml")]
    given = ("evaluate", place / target, *asked, "--device", "cpu", "--out", out, *options)
    return main([*map(str, given)])


def items(out, name):
    return [json.loads(line) for line in (out / "items" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_greedy_answers_and_figures_are_those_of_transformers(place, tmp_path, stub, capsys):
    assert evaluate(place, tmp_path / "ours") == 0
    assert not stub.started
    assert evaluate(place, tmp_path / "vllm", "--backend", "vllm") == 0
    # The model, then its base: one engine at a time, and only for what is generated.
    assert stub.started == [str(place / "expanded"), str(place / "base")]
    assert len(stub.asked) == 2 * 8
    assert {params.temperature for params in stub.asked} == {0.0}
    for name in ("writing", "choice"):
        assert items(tmp_path / "vllm", name) == items(tmp_path / "ours", name)
    ours, theirs = (
        json.loads((tmp_path / side / "task-writing.json").read_text()) for side in ("ours", "vllm")
    )
    assert theirs["metrics"] == ours["metrics"]
    assert any(line["answer"] != line["base_answer"] for line in items(tmp_path / "ours", "writing"))
    # Who wrote is recorded; what was asked is the same, so the two can be compared.
    assert theirs["provenance"]["data"]["backend"] == "vllm 0.stub"
    assert theirs["asked"] == ours["asked"]
    assert theirs["identity"] != ours["identity"]
    stub.started.clear()
    assert evaluate(place, tmp_path / "vllm", "--backend", "vllm") == 0
    assert not stub.started


def test_conversations_are_those_of_transformers(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = TEMPLATE
    talks = [[user("block gate")], [user("norm"), assistant("head"), user("layer " * 20)], [user("token")]]
    model = deepen.load(place / "expanded")
    served = VllmModel(place / "expanded", VllmEngines({}))
    ours, theirs = (
        LiveChat(lambda which=which: which, tokenizer, "digest", max_new_tokens=8)
        for which in (model, served)
    )
    plain = ours.reply(talks)
    assert theirs.reply(talks) == plain
    stop = [plain[0][2:4]]
    assert theirs.reply(talks, stop) == ours.reply(talks, stop)
    assert len(theirs.reply(talks, stop)[0]) < len(plain[0])


def test_samples_of_one_prompt_differ_and_a_seed_repeats_them(place, stub):
    model = VllmModel(place / "base", VllmEngines({}))
    ids = torch.full((6, 3), 7)

    def sampled():
        torch.manual_seed(3)
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_length=3 + 12,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        )

    first = sampled()
    assert first.shape == (6, 15)
    assert len({tuple(row) for row in first.tolist()}) > 1
    assert torch.equal(sampled(), first)
    assert {(each.temperature, each.top_p, each.top_k) for each in stub.asked} == {(0.8, 0.95, 50)}
    assert len({each.seed for each in stub.asked}) == 6


def test_padding_stays_out_and_texts_end_where_they_end(place, stub):
    model = VllmModel(place / "base", VllmEngines({}))
    first = model.generate(
        input_ids=torch.tensor([[0, 0, 5], [4, 9, 5]]),
        attention_mask=torch.tensor([[0, 0, 1], [1, 1, 1]]),
        generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=None, pad_token_id=0),
    )
    assert first.shape == (2, 7)
    end = int(first[1, 4])
    ended = model.generate(
        input_ids=torch.tensor([[4, 9, 5]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=[end], pad_token_id=0),
    )
    assert ended[0].tolist() == first[1, : 3 + first[1, 3:].tolist().index(end) + 1].tolist()


def test_what_vllm_would_pass_over_is_refused(place):
    model = VllmModel(place / "base", VllmEngines({}))
    with pytest.raises(EvaluationError, match="num_beams"):
        model.generate(
            input_ids=torch.ones(1, 2, dtype=torch.long),
            attention_mask=torch.ones(1, 2, dtype=torch.long),
            generation_config=GenerationConfig(max_new_tokens=2, num_beams=4),
        )


def test_a_pack_is_refused_with_the_command_that_merges_it(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out", "--backend", "vllm", target="pack") == 2
    said = capsys.readouterr().err
    command = next(line for line in said.splitlines() if line.startswith("deepen blocks merge"))
    assert main([*command.split()[1:-1], str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "vlm"), "choose from transformers, vllm"),
        (("--engine", "tensor_parallel_size=2"), "give --backend vllm too"),
        (("--backend", "vllm", "--engine", "tensor_parallel_size"), "give KEY=VALUE"),
        (("--backend", "vllm", "--engine", "tensor_parallel_size=2"), "there is one GPU"),
    ],
)
def test_faults_are_said(place, tmp_path, capsys, options, said):
    assert evaluate(place, tmp_path, *options, tasks=("writing",)) == 2
    assert said in capsys.readouterr().err


def test_without_vllm_its_command_is_named(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert evaluate(place, tmp_path, "--backend", "vllm") == 2
    assert "pip install vllm" in capsys.readouterr().err
