import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from suite_tasks import ROWS, write_own_tasks
from tiny_run import write_base, write_recipe, write_trained_pack

import deepen
from deepen.cli import main
from deepen.errors import EvaluationError
from deepen.evaluation.suites import parse_task, read_suite, suite_names, task_specs
from deepen.records import EvaluationRecord, ScoredItem, ScoredTask, TaskRecord, read_record
from deepen.report import finding
from deepen.report.wording import change, loss

pytest.importorskip("lm_eval", reason="benchmarks need deepen[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

KINDS = ["choice", "writing", "last-word", "whole"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base, a pack on it that is not the identity, and tasks."""
    root = tmp_path_factory.mktemp("suites")
    write_base(root / "base")
    write_own_tasks(root / "tasks")
    write_trained_pack(root / "base", root / "pack")
    # Every model that is let go is collected, which takes long among all that torch and the harness hold.
    gc.freeze()
    yield root
    gc.unfreeze()


def evaluate(place, target, *names, **options):
    from deepen.pipeline.evaluate import Request, evaluate_model

    tasks = tuple(parse_task(str(place / "tasks" / f"{name}.yaml")) for name in names)
    return evaluate_model(Request(target=str(place / target), tasks=tasks, device="cpu", **options))


def items(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "items" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def of_pack(place):
    """The tasks of each kind on the pack and its base, and where their items lie."""
    return evaluate(place, "pack", *KINDS, out=place / "of-pack"), place / "of-pack"


@pytest.fixture(scope="module")
def of_base(place):
    """The same on the base loaded from disk."""
    return evaluate(place, "base", *KINDS, out=place / "of-base"), place / "of-base"


def test_bypassed_base_is_the_base_loaded_from_disk_to_the_bit(of_pack, of_base):
    changed = []
    for name in KINDS:
        both, alone = items(of_pack[1], name), items(of_base[1], name)
        assert [line["base_answer"] for line in both] == [line["answer"] for line in alone]
        assert [line["request"] for line in both] == [line["request"] for line in alone]
        assert all("base" not in line for line in alone)
        changed += [line["answer"] != line["base_answer"] for line in both]
    assert any(changed)


def test_metrics_stand_beside_the_base_and_equal_the_items(of_pack):
    found, tmp_path = of_pack
    assert {(metric.task, metric.metric) for metric in found.metrics} == {
        ("choice", "acc"), ("choice", "acc_norm"), ("writing", "exact_match"),
        ("last-word", "acc"), ("last-word", "perplexity"), ("whole", "bits_per_byte"),
    }  # fmt: skip
    by_name = {(metric.task, metric.metric): metric for metric in found.metrics}
    lines = items(tmp_path, "choice")
    value, base = (np.mean([line[side]["acc"] for line in lines]) for side in ("value", "base"))
    acc = by_name["choice", "acc"]
    assert (acc.value, acc.base_value, acc.delta, acc.n) == (value, base, value - base, len(ROWS))
    right = [max(range(3), key=lambda at: line["answer"][at][0]) == line["target"] for line in lines]
    assert [line["value"]["acc"] == 1 for line in lines] == right
    bits = by_name["whole", "bits_per_byte"]
    assert bits.ci_low < bits.delta < bits.ci_high


def test_whole_texts_are_scored_as_transformers_does(place, of_base):
    (found,) = [metric for metric in of_base[0].metrics if metric.task == "whole"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    nats = size = 0
    for row in ROWS:
        text = f"{row['query']} {row['choices'][0]}"
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(text.encode())
    assert found.value == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_what_is_finished_is_not_rerun(place, tmp_path, monkeypatch):
    first = evaluate(place, "pack", "choice", out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("deepen.pipeline.subject.load", lambda *_, **__: pytest.fail("the model was loaded"))
        assert evaluate(place, "pack", "choice", out=tmp_path).metrics == first.metrics
    limited = evaluate(place, "pack", "choice", out=tmp_path, limit=3)
    assert {metric.n for metric in limited.metrics} == {3}
    assert evaluate(place, "base", "choice", out=tmp_path).metrics[0].base_value is None


def test_a_broken_task_is_reported_and_the_rest_goes_on(place, tmp_path, capsys):
    tasks = [str(place / "tasks" / f"{name}.yaml") for name in ("broken", "choice")]
    asked = [part for task in [*tasks, "no-such-task.yaml"][:2] for part in ("--task", task)]
    code = main(
        ["evaluate", str(place / "pack"), *asked, "--device", "cpu", "--out", str(tmp_path), "--json"]
    )
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert code == 2
    assert "error: 1 tasks failed" in said.err
    assert "broken: " in said.err
    assert "Traceback" not in said.err
    assert [metric["task"] for metric in answer["metrics"]] == ["choice", "choice"]
    keys = {"task", "metric", "value", "stderr", "n", "base_value", "delta", "ci_low", "ci_high"}
    assert answer["metrics"][0].keys() >= keys
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items", "task-choice.json"]


def test_a_base_apart_is_loaded_after_the_model(place, tmp_path, monkeypatch):
    one = evaluate(place, "pack", "choice", "writing", out=tmp_path / "pack")
    deepen.merge_pack(place / "base", place / "pack", tmp_path / "merged")
    (tmp_path / "merged" / "expansion.json").unlink(missing_ok=True)
    target, base = tmp_path / "merged", str(place / "base")
    import deepen.pipeline.tasks as tasks

    score, scored = tasks.score_task, []

    def interrupted(loaded, *rest):
        scored.append(loaded.spec.label)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(loaded, *rest)

    monkeypatch.setattr(tasks, "score_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(place, target, "choice", "writing", base=base, out=tmp_path / "two")
    scored.clear()
    monkeypatch.setattr(tasks, "score_task", lambda *all: (scored.append(all[0].spec.label), score(*all))[1])
    two = evaluate(place, target, "choice", "writing", base=base, out=tmp_path / "two")
    assert scored == ["choice", "writing"]
    assert two.metrics == one.metrics
    assert not (tmp_path / "two" / "waiting").exists()


def test_a_batch_that_does_not_fit_is_halved(place, tmp_path, monkeypatch):
    some = ["choice", "whole"]
    small = evaluate(place, "base", *some, out=tmp_path / "small", batch_size=2)
    from deepen.evaluation.suites import bridge

    real, refused = bridge.HFLM._model_call, []

    def scarce(self, inps, *rest, **more):
        if len(inps) > 2:
            refused.append(len(inps))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inps, *rest, **more)

    monkeypatch.setattr(bridge.HFLM, "_model_call", scarce)
    large = evaluate(place, "base", *some, out=tmp_path / "large", batch_size=8)
    assert refused
    assert large.metrics == small.metrics
    for name in some:
        assert items(tmp_path / "large", name) == items(tmp_path / "small", name)
    monkeypatch.setattr(bridge.HFLM, "_model_call", lambda *_, **__: scarce(None, "too long"))
    assert "does not fit the memory" in evaluate(place, "base", "choice", batch_size=2).failures[0]


def test_generated_texts_go_to_the_scorer(place, tmp_path):
    from deepen.evaluation.suites.bridge import LiveModel
    from deepen.evaluation.suites.library import TaskLibrary
    from deepen.evaluation.suites.pairing import pair_task
    from deepen.evaluation.suites.scoring import build_requests, score_task
    from deepen.pipeline.texts import load_tokenizer

    spec = replace(
        parse_task(str(place / "tasks" / "writing.yaml")), samples=3, temperature=1.0, scorer="long"
    )
    loaded = TaskLibrary().load(spec)
    build_requests(loaded, 4)
    live = LiveModel(deepen.load(place / "base"), load_tokenizer(place / "base"))
    seen = []

    def scorer(documents, texts):
        seen.extend(zip(documents, texts, strict=True))
        return [{"pass@1": float(len(set(each)) > 1)} for each in texts]

    scored = score_task(loaded, live, 4, {"long": scorer})
    assert [document["query"] for document, _ in seen] == [row["query"] for row in ROWS[:4]]
    assert all(len(texts) == 3 for _, texts in seen)
    assert any(len(set(texts)) > 1 for _, texts in seen), "nothing was sampled"
    again = score_task(loaded, live, 4, {"long": scorer})
    assert again == scored, "sampling is seeded"
    (metric,) = pair_task(loaded, scored, scored).metrics
    assert (metric.task, metric.metric, metric.delta) == ("writing@3", "pass@1", 0)
    with pytest.raises(EvaluationError, match="nothing here can score generated texts as long"):
        score_task(loaded, live, 4, {})


PROBLEM = {
    "task_id": 0, "text": "Add.", "code": "def f(a):\n  return a + 1",
    "test_list": ["assert 1", "assert 2", "assert 3"],
    "prompt": "def f(a):\n", "test": "def check(f): pass", "entry_point": "f",
    "question": "How many?", "answer": "Two and two.\n#### 4", "labels": [], "label_text": "",
}  # fmt: skip
RECORDS = [
    {**PROBLEM, "task_id": at, "text": f"text {at}", "labels": [at % 8, 7][: at % 3]} for at in range(6)
]


def asked(place, tmp_path, name, shots):
    """The requests of a shipped task file over local records, and its values under the tiny base."""
    from deepen.evaluation.suites.bridge import LiveModel
    from deepen.evaluation.suites.library import TaskLibrary
    from deepen.evaluation.suites.scoring import build_requests, score_task
    from deepen.pipeline.texts import load_tokenizer

    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    spec = next(spec for suite in suite_names() for spec in read_suite(suite) if Path(spec.name).stem == name)
    loaded = TaskLibrary(tmp_path).load(replace(spec, shots=shots))
    build_requests(loaded, 2)
    if spec.scorer:
        return [request.args[0] for request in loaded.tasks[name].instances], []
    live = LiveModel(deepen.load(place / "base"), load_tokenizer(place / "base"))
    scored = score_task(loaded, live, 2, {})
    return [item.request[0][0] for item in scored.items], scored.items


def test_mbpp_shows_the_three_examples_of_its_paper(place, tmp_path):
    (prompt, _), _ = asked(place, tmp_path, "mbpp", 3)
    assert [prompt.index(f"text {at} ") for at in (2, 3, 4)] == sorted(
        prompt.index(f"text {at} ") for at in (2, 3, 4)
    )
    assert prompt.count("[BEGIN]") == 4
    assert prompt.count("[DONE]") == 3
    assert "text 1 " not in prompt
    assert prompt.endswith("assert 3\n[BEGIN]\n")


def test_humaneval_asks_for_the_body(place, tmp_path):
    prompts, _ = asked(place, tmp_path, "humaneval", 0)
    assert prompts == [PROBLEM["prompt"]] * 2


def test_mathematics_by_program_shows_programs(place, tmp_path):
    (prompt, _), _ = asked(place, tmp_path, "gsm8k_pot", 3)
    assert prompt.count("def solution():\n") == 4
    assert prompt.count("return result") == 3
    assert prompt.endswith("Q: How many?\n\n# solution in Python:\n\n\ndef solution():\n")


def test_unfair_terms_count_any_label(place, tmp_path):
    (prompt, _), found = asked(place, tmp_path, "unfair_tos", 1)
    assert prompt.count("Clause: ") == 2
    assert [item.target for item in found] == [[1], [2, 7]]
    for item in found:
        nats = [each[0] for each in item.answer]
        assert item.values["acc"] == float(nats.index(max(nats)) in item.target)
        assert item.values["acc_per_token"] in (0, 1)


def test_a_group_is_one_result_over_the_items_of_its_members(place, tmp_path):
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        file = tmp_path / f"part{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"task: part{number}", "dataset_path: json", "output_type: multiple_choice"]
        lines += [f"dataset_kwargs: {{data_files: {{test: '{file}'}}}}", "test_split: test"]
        lines += ["doc_to_text: '{{query}}'", "doc_to_choice: '{{choices}}'", "doc_to_target: '{{gold}}'"]
        lines += ["metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"]
        (tmp_path / f"part{number}.yaml").write_text("\n".join(lines))
    group = "group: parts\ntask: [part0, part1]\n"
    group += "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    (tmp_path / "parts.yaml").write_text(group)
    found = evaluate(place, "pack", tmp_path / "parts", out=tmp_path / "out")
    (metric,) = found.metrics
    record = read_record(tmp_path / "out" / "task-parts.json", TaskRecord)
    assert (metric.task, metric.n) == ("parts", len(ROWS))
    assert metric.value == pytest.approx(record.results["parts"]["acc,none"])
    assert metric.base_value == pytest.approx(record.base_results["parts"]["acc,none"])
    assert record.results.keys() == {"parts", "part0", "part1"}


@pytest.mark.slow
def test_a_task_of_the_harness_over_a_local_copy(data_dir, place, tmp_path):
    (tmp_path / "local" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "local" / "gsm8k" / f"{split}.jsonl").symlink_to(
            data_dir / "math" / f"gsm8k-{split}.jsonl"
        )
    (tmp_path / "local" / "humaneval.jsonl.gz").symlink_to(data_dir / "code" / "HumanEval.jsonl.gz")
    from deepen.pipeline.evaluate import Request, evaluate_model

    specs = task_specs([], ["gsm8k:2", "humaneval", "no_such_task"])
    model = str(data_dir / "models" / "stories260k")
    found = evaluate_model(
        Request(
            target=model, tasks=specs, local=tmp_path / "local", limit=3, device="cpu", out=tmp_path / "out"
        )
    )
    assert [metric.metric for metric in found.metrics] == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    ]
    assert "without a sandbox" in found.failures[0]
    assert "no_such_task: no such task" in found.failures[1]
    # Both passes of a base apart find the copies.
    request = Request(
        target=model, base=model, tasks=specs[:1], local=tmp_path / "local", limit=2, device="cpu"
    )
    assert {metric.delta for metric in evaluate_model(request).metrics} == {0}
    (line, *_) = items(tmp_path / "out", "gsm8k-2")
    assert line["request"][0][0].count("Question:") == 3


def test_likelihood_per_token_counts_any_right_choice():
    from deepen.evaluation.suites.scoring import _per_token

    sample = {
        "arguments": [["c", " a"], ["c", " b b b"], ["c", " d"]],
        "filtered_resps": [[-2.0, False], [-3.0, False], [-1.5, False]],
        "target": [1, 2],
    }
    lengths = {("c", " a"): 1, ("c", " b b b"): 3, ("c", " d"): 1}
    assert _per_token(sample, lengths) == 1
    assert _per_token(sample | {"target": 2}, lengths) == 0


def test_the_paper_s_shots():
    shots = {spec.name: spec.shots for spec in read_suite("open-llm")}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip
    assert suite_names() == ["code", "law", "math", "open-llm", "safety"]


def test_every_task_of_every_suite_is_one_of_the_harness_or_a_file():
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    named = {spec.name for suite in suite_names() for spec in read_suite(suite)}
    assert all(Path(name).is_file() for name in named if name.endswith(".yaml"))
    texts = "\n".join(
        path.read_text("utf-8") for path in folder.rglob("*.yaml") if path.stat().st_size < 20_000
    )
    for name in named:
        if not name.endswith(".yaml"):
            assert f"task: {name}\n" in texts or f"group: {name}\n" in texts, name


@pytest.mark.parametrize(
    ("suites", "tasks", "said"),
    [
        (["open_llm"], [], "suite open_llm: not found (known: code, law, math, open-llm, safety"),
        ([], ["quiz.yaml:3"], "task quiz.yaml: no such file"),
    ],
)
def test_unknown_names_are_said_in_words(suites, tasks, said):
    with pytest.raises(EvaluationError, match=said.replace("(", r"\(")):
        task_specs(suites, tasks)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("deepen.evaluation.suites.spec.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'deepen\[eval\]'"):
        task_specs(["law"], [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kind: choice", "kind: Input should be"),
        ("path: nowhere.jsonl", "nowhere.jsonl is not there"),
        ("answer: [", "not valid YAML"),
        ("choices: ['a', 'b']", "choices belong to multiple_choice"),
        ("shot: 3", "shot: Extra inputs"),
    ],
)
def test_faulty_descriptions(place, tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_text((place / "tasks" / "rows.jsonl").read_text())
    key = line.partition(":")[0]
    lines = {"name": "name: quiz", "path": "path: rows.jsonl", "kind": "kind: generate"}
    lines |= {"question": "question: a", "answer": "answer: b", key: line}
    (tmp_path / "quiz.yaml").write_text("\n".join(lines.values()) + "\n")
    found = evaluate(place, "base", tmp_path / "quiz")
    assert said in found.failures[0]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run with held-out texts of both roles and a task."""
    root = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        root,
        base=str(place / "base"),
        train__evaluate_every=None,
        train__checkpoint_every=None,
        evaluate__tasks=[str(place / "tasks" / "choice.yaml")],
        evaluate__limit=5,
    )
    deepen.run_recipe(deepen.load_recipe(recipe))
    return root / "run"


def test_a_run_evaluates_the_tasks_of_its_recipe(trained, capsys):
    record = read_record(trained / "evaluation" / "task-choice.json", TaskRecord)
    assert {metric.n for metric in record.metrics} == {5}
    assert main(["evaluate", str(trained), "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr()
    assert "not rerun" in said.err
    answer = json.loads(said.out)
    assert [metric["task"] for metric in answer["metrics"]][-2:] == ["choice", "choice"]
    assert "nats_per_token" in {metric["metric"] for metric in answer["metrics"]}


def test_a_text_is_not_hidden_by_the_runs_own_of_its_name(trained, tmp_path, capsys):
    (tmp_path / "general.txt").write_text("other words. " * 100)
    assert main(["evaluate", str(trained), "--text", str(tmp_path / "general.txt"), "--device", "cpu"]) == 2
    assert "general: the run was evaluated on a text of this name already" in capsys.readouterr().err


def test_a_trained_run_shows_what_was_learned_and_kept(place, trained, capsys):
    """Base, value, difference, interval and verdict; the base's value is that of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    main(["evaluate", str(trained), "--device", "cpu"])
    table = capsys.readouterr().out.splitlines()
    page, card = (trained / "report.html").read_text(), (trained / "README.md").read_text()
    metrics = read_record(trained / "evaluation" / "heldout.json", EvaluationRecord).metrics
    nats = {metric.role: metric for metric in metrics if metric.metric == "nats_per_token"}
    for role, name in (("general", "general"), ("domain", "heldout")):
        metric, total, count = nats[role], 0.0, 0
        for line in (trained.parent / f"{name}.jsonl").read_text().splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            for window in (ids[:, at : at + 33] for at in range(0, ids.shape[1] - 1, 32)):
                with torch.no_grad():
                    total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
                count += window.shape[1] - 1
        assert metric.base_value == pytest.approx(total / count, rel=1e-4)
        assert metric.delta == pytest.approx(metric.value - metric.base_value)
        assert metric.ci_low < metric.delta < metric.ci_high
        assert metric.p <= metric.p_holm
        expected = "kept" if metric.ci_high < metric.margin else "lost"
        assert metric.verdict == (expected if metric.ci_low > metric.margin or expected == "kept" else None)
        (line,) = [line for line in table if line.startswith(f"{metric.task} ") and "nats" in line]
        shown = [f"{each:.4f}" for each in (metric.base_value, metric.value)]
        shown += [f"{each:+.4f}" for each in (metric.delta, metric.ci_low, metric.ci_high)]
        assert all(each in line for each in shown)
        assert line.endswith(finding(metric))
        for text in (page, card):
            assert loss(metric.base_value) in text
            assert change(metric.ci_low) in text
        assert f">{finding(metric)}<" in page
    assert nats["domain"].verdict == "kept"
    assert "choice" in page
    assert "| choice | general | acc ↑ | 5 |" in card


def test_all_tasks_are_compared_together(place, tmp_path, monkeypatch):
    import deepen.evaluation.suites.comparing as comparing

    compare, calls = comparing.compare_items, []
    monkeypatch.setattr(
        comparing, "compare_items", lambda items: (calls.append(len(items)), compare(items))[1]
    )
    found = evaluate(place, "pack", "choice", "last-word", out=tmp_path)
    assert calls == [2, 1, 3]
    records = [read_record(path, TaskRecord) for path in sorted(tmp_path.glob("task-*.json"))]
    assert [metric for record in records for metric in record.metrics] == found.metrics


def test_texts_are_scored_once_and_have_a_role(place, tmp_path, capsys, monkeypatch):
    for name, words in (("kept", "block gate norm. "), ("learned", "head token. "), ("third", "layer. ")):
        (tmp_path / f"{name}.txt").write_text(words * 400)

    def scored(*asked):
        options = ["--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
        assert main(["evaluate", str(place / "pack"), *map(str, asked), *options]) == 0
        said = capsys.readouterr()
        metrics = json.loads(said.out)["metrics"]
        return [metric for metric in metrics if metric["metric"] == "nats_per_token"], said.err

    both = ("--text", tmp_path / "kept.txt", "--domain-text", tmp_path / "learned.txt")
    first, _ = scored(*both)
    assert [(each["task"], each["role"]) for each in first] == [("kept", "general"), ("learned", "domain")]
    for each in first:
        assert each["delta"] == pytest.approx(each["value"] - each["base_value"])
        assert each["p"] <= each["p_holm"]
        assert each["margin"] == 0.01
        assert each["verdict"] in {"kept", "lost", "not enough items"}
    with monkeypatch.context() as patch:
        patch.setattr("deepen.pipeline.subject.load", lambda *_, **__: pytest.fail("the model was loaded"))
        again, said = scored(*both)
    assert (again, "not scored again" in said) == (first, True)
    import deepen.pipeline.losses as losses

    evaluate, seen = losses.evaluate_texts, []

    def record(model, texts, **more):
        seen.append([text.task for text in texts])
        return evaluate(model, texts, **more)

    monkeypatch.setattr(losses, "evaluate_texts", record)
    more, _ = scored("--text", tmp_path / "kept.txt", "--text", tmp_path / "third.txt")
    assert seen == [["third"], ["third"]]
    assert more[0]["value"] == first[0]["value"]
    kept = read_record(tmp_path / "out" / "texts.json", EvaluationRecord)
    assert [text.task for text in kept.texts] == ["kept", "learned", "third"]
    (tmp_path / "kept.txt").write_text("norm gate. " * 400)
    assert scored("--text", tmp_path / "kept.txt")[0][0]["value"] != first[0]["value"]
    assert seen[2:] == [["kept"], ["kept"]]


def test_nothing_asked(place, capsys):
    assert main(["evaluate", str(place / "base")]) == 2
    assert "nothing to evaluate: give --suite, --task, --text, --chat or --tools" in capsys.readouterr().err


def test_items_survive_json():
    item = ScoredItem(
        task="a", doc_id=0, values={"acc": 1.0, "bits_per_byte": [-3.5, 7]}, answer=[[-0.1, True]]
    )
    scored = ScoredTask(results={"a": {"acc,none": 1.0}}, items=[item])
    assert ScoredTask.model_validate_json(scored.model_dump_json()) == scored
