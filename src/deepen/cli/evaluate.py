import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json
from deepen.errors import EvaluationError

if TYPE_CHECKING:
    from deepen.config import TextSet
    from deepen.evaluation.chat import Judge
    from deepen.pipeline.evaluate import Evaluation
    from deepen.records import Metric, SwitchEvaluation

app = new_app()

Model = Annotated[
    str, typer.Argument(help="A run, a block pack, an adapter, or a checkpoint (directory or hub id).")
]
Base = Annotated[str | None, typer.Option(help="The base, where the model does not say it or it has moved.")]
Suites = Annotated[list[str] | None, typer.Option(help="open-llm, code, math, law, safety, or a YAML file.")]
TaskNames = Annotated[
    list[str] | None, typer.Option(help="A task of the harness or a YAML file, with shots: arc_easy:5.")
]
Texts = Annotated[list[str] | None, typer.Option(help="Text whose loss must be kept (.txt, .jsonl …).")]
DomainTexts = Annotated[list[str] | None, typer.Option(help="Text whose loss must fall.")]
SwitchBy = Annotated[
    str | None, typer.Option(help="auto, or a switch of `deepen blocks switch`: measure it on the texts.")
]
Questions = Annotated[Path | None, typer.Option(help="Questions of a conversation each, one JSON a line.")]
JudgeUrl = Annotated[
    str | None, typer.Option(help="Endpoint that judges the answers to --chat: https://host/v1.")
]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name there.")]
ToolTasks = Annotated[
    Path | None, typer.Option(help="Tasks to be solved in turns with Python, one JSON a line.")
]
Turns = Annotated[int, typer.Option(min=1, help="Largest budget of turns of --tools; each from 1 is played.")]
Length = Annotated[int, typer.Option(min=1, help="Longest reply to --chat and --tools, in tokens.")]
Local = Annotated[Path | None, typer.Option(help="Directory of local copies of datasets.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a forward pass; default: as many as fit.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda …")]
BackendName = Annotated[
    str, typer.Option(help="transformers, or vllm for what is generated (ordinary checkpoints only).")
]
Engine = Annotated[
    list[str] | None, typer.Option(help="An argument of vLLM's engine: tensor_parallel_size=2.")
]
Unprotected = Annotated[
    str, typer.Option(help="The sandbox's sentence, to run programs where nothing confines them.")
]
Out = Annotated[
    Path | None, typer.Option(help="Keep records and items here; a run keeps them in evaluation/.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def evaluate(
    model: Model,
    base: Base = None,
    suite: Suites = None,
    task: TaskNames = None,
    text: Texts = None,
    domain_text: DomainTexts = None,
    switch: SwitchBy = None,
    chat: Questions = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    tools: ToolTasks = None,
    turns: Turns = 5,
    max_new_tokens: Length = 1024,
    local: Local = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    backend: BackendName = "transformers",
    engine: Engine = None,
    allow_unprotected: Unprotected = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Score a model and its base on the same items: benchmarks, held-out loss of texts, conversations."""
    # None imports torch: a suite that does not exist is said at once.
    from deepen.evaluation.suites import task_specs

    specs = task_specs(suite or [], task or [])
    judging = _judge(chat, judge, judge_model)
    from deepen.cli.display import display

    with display() as reporter:
        from deepen.pipeline.chat import ChatSettings
        from deepen.pipeline.evaluate import Request, evaluate_model

        request = Request(
            target=model,
            base=base,
            tasks=specs,
            texts=_sets(text),
            domain_texts=_sets(domain_text),
            switch=switch,
            chat=ChatSettings(
                questions=chat, judge=judging, tools=tools, turns=turns, max_new_tokens=max_new_tokens
            ),
            local=local,
            limit=limit,
            batch_size=batch_size,
            device=device,
            backend=backend,
            engine=_arguments(engine or []),
            allow_unprotected=allow_unprotected,
            out=out,
        )
        found = evaluate_model(request, reporter)
    _report(found, as_json)
    _fail(found.failures)


def _sets(paths: list[str] | None) -> "tuple[TextSet, ...]":
    from deepen.config import TextSet

    return tuple(TextSet(path=path) for path in paths or [])


def _judge(questions: Path | None, url: str | None, name: str | None) -> "Judge | None":
    """Return who judges; the key is read from OPENAI_API_KEY when it is asked."""
    if questions is None and url is None and name is None:
        return None
    if questions is None or url is None or name is None:
        raise EvaluationError("--chat, --judge and --judge-model belong together; give all three")
    from deepen.evaluation.chat import Endpoint, Judge

    return Judge(endpoint=Endpoint(url=url, model=name))


def _arguments(given: list[str]) -> dict[str, object]:
    """Read `KEY=VALUE`, values as YAML has them."""
    import yaml

    pairs = [each.partition("=") for each in given]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise EvaluationError(f"--engine {key}: give KEY=VALUE, such as tensor_parallel_size=2")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _fail(failures: list[str]) -> None:
    if failures:
        said = f"error: {len(failures)} tasks failed; the others' results are kept"
        print(said, *failures, sep="\n", file=sys.stderr)
        raise typer.Exit(2)


def _report(found: "Evaluation", as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "model": found.subject.model.name,
                "base": found.subject.base,
                "metrics": found.metrics,
                "failed": found.failures,
                "switch": found.switch,
                "out": found.out,
            }
        )
        return
    for line in _table(found.metrics):
        print(line)
    if found.switch is not None:
        _report_switch(found.switch)
    if found.out is not None:
        print(f"records and items: {found.out}")
        if (found.out.parent / "result.json").exists():
            print(f"on the run's page and card: deepen report {found.out.parent}")


def _report_switch(found: "SwitchEvaluation") -> None:
    """Print the switch beside what it switches: losses after the prompt, decisions, cost."""
    print(f"\nswitch: {found.kind}, threshold {found.threshold:g} {found.unit}; nats per token behind")
    print(f"the first {found.prompt_tokens} tokens of each window, which decide who answers it")
    rows = [
        metric.model_copy(update={"metric": row.answers if row.answers == "switch" else f"{row.answers} on"})
        for row in found.rows
        for metric in row.metrics
    ]
    print(*_table(sorted(rows, key=lambda each: each.task)), sep="\n")
    for tally in found.tallies:
        answered = ", ".join(f"{name} {count}" for name, count in tally.answered.items())
        share = tally.wrong / tally.prompts
        print(f"{tally.text}: {tally.prompts} prompts: {answered}; {tally.wrong} wrong ({share:.1%})")
    cost, prefill = found.cost, found.cost.flops / found.cost.prefill_flops
    print(
        f"a decision passes {cost.tokens:,.0f} tokens: {prefill:.2f} times the base's prefill of the prompt"
    )


def _table(metrics: "list[Metric]") -> list[str]:
    """Lines of equal columns: task, metric, n, base, model, difference, interval, p and verdict."""
    from deepen.report import finding, p_value

    rows = [("task", "metric", "n", "base", "model", "delta", "95% interval", "p (Holm)", "verdict")]
    for each in metrics:
        ends = (each.ci_low, each.ci_high)
        rows.append(
            (
                each.task,
                each.metric,
                str(each.n),
                _number(each.base_value),
                _number(each.value),
                _number(each.delta, "+"),
                "" if None in ends else f"{_number(each.ci_low, '+')} … {_number(each.ci_high, '+')}",
                "" if each.p_holm is None else p_value(each.p_holm),
                "" if each.verdict is None else finding(each),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 or column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}"
