import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.errors import ChatError

app = new_app()

Model = Annotated[
    str, typer.Argument(help="A run, a block pack, an adapter, or a checkpoint (directory or hub id).")
]
Base = Annotated[str | None, typer.Option(help="The base, where the model does not say it or it has moved.")]
Packs = Annotated[
    list[str] | None, typer.Option(help="A block pack, or a run, to put on the model; may be repeated.")
]
SwitchBy = Annotated[
    str | None,
    typer.Option(help="Decide for each question which pack answers: auto, or a switch's directory."),
]
Template = Annotated[
    str | None, typer.Option(help="Chat template: a name or a .jinja file; default: the tokenizer's own.")
]


@app.command()
def chat(
    model: Model,
    base: Base = None,
    pack: Packs = None,
    switch: SwitchBy = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base answer beside it.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve a page that compares them in a browser.")] = False,
    host: Annotated[str, typer.Option(help="Address the page is served at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any.")] = 7860,
    template: Template = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[
        float, typer.Option(min=0, max=5, help="0: always the most probable token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the probability drawn from.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a question.")] = False,
) -> None:
    """Talk with a model, alone or beside its base, in the terminal or in a browser."""
    if web and find_spec("gradio") is None:
        raise ChatError("the page needs gradio, which is not installed\npip install 'deepen[web]'")
    from deepen.cli.display import display

    with display() as reporter:
        reporter.stage(f"loading {model}")
        from deepen.dialogue.cast import load_cast

        cast = load_cast(
            model,
            base=base,
            packs=pack or [],
            switch=switch,
            template=template,
            compare=compare or web,
            device=device,
        )
        for note in cast.notes:
            reporter.note(note)
    from deepen.dialogue.talk import Talk
    from deepen.dialogue.writing import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    talk = Talk(cast, compare=compare or web, system=system, sampling=sampling)
    if web:
        from deepen.dialogue.page import serve

        serve(talk, host, port)
        return
    from deepen.dialogue.terminal import Terminal, describe_packs

    if sys.stdin.isatty():
        print(describe_packs(talk), "/help lists the commands", sep="\n", file=sys.stderr)
    Terminal(talk, as_json=as_json).run()
