"""A page that shows a model and its base side by side, and where they disagree (extra `web`: gradio)."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

# Read when gradio is imported: nothing is sent anywhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware

from deepen.dialogue.next_tokens import Place, compare_next_tokens
from deepen.dialogue.page_parts import (
    STYLE,
    ContentPolicy,
    first_difference,
    guess_tables,
    heading,
    marked_tokens,
    summary,
)
from deepen.dialogue.talk import Answer, Talk
from deepen.dialogue.terminal import describe_voice
from deepen.dialogue.writing import Sampling
from deepen.errors import ChatError, DeepenError

# Seconds between two pictures of an answer that grows.
_EVERY: Final = 0.05
_WHOSE: Final = {"the model's answer": "model", "the base's answer": "base"}


def serve(talk: Talk, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        talk: what a visit begins with; compares.
        host: address to serve at.
        port: of it; 0: the first that is free, from 7860.

    Raises:
        ChatError: the port is taken.
    """
    page = launch(talk, host, port)
    print(f"{page.local_url}  (Ctrl-C ends)", flush=True)
    page.block_thread()


def launch(talk: Talk, host: str, port: int) -> Any:
    """Serve in the background, otherwise as `serve` does; return gradio's `Blocks`."""
    page = _Page(talk).build()
    try:
        page.queue().launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=_theme(),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        )
    except OSError as error:
        raise ChatError(f"{host}:{port}: cannot be served at ({error}); give another --port") from None
    return page


def _theme() -> Any:
    # Of its own copy of the font gradio brings these two weights whole, of others a few letters.
    font = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", spacing_size="sm", font=font)


class _Page:
    """The page's parts, and what happens when something is asked, switched or chosen.

    Each visit holds a `Talk` of its own, all on one load.
    """

    def __init__(self, first: Talk) -> None:
        self._first, self._cast = first, first.cast

    def build(self) -> Any:
        with gr.Blocks(title=f"deepen chat: {self._cast.name}", analytics_enabled=False) as page:
            self.talk, self.places = gr.State(), gr.State([])
            gr.HTML(heading(self._cast))
            self._place_settings()
            self._place_columns()
            self._place_tokens()
            self._connect()
        return page

    def _place_settings(self) -> None:
        held, sampling = self._cast.model.packs, self._first.sampling
        with gr.Row(equal_height=True):
            self.packs = gr.CheckboxGroup(
                list(held),
                value=list(self._cast.packs),
                label="Packs that are on; a switch asks the conversation again",
                visible=bool(held),
                elem_id="packs",
            )
        with gr.Accordion("Settings", open=False), gr.Row():
            self.temperature = gr.Slider(
                0, 2, sampling.temperature, step=0.05, label="Temperature; 0: the most probable token"
            )
            self.top_p = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top-p")
            self.most = gr.Number(sampling.max_tokens, label="Tokens of an answer", minimum=1, precision=0)
            self.seed = gr.Number(sampling.seed, label="Seed", minimum=0, precision=0)
            self.system = gr.Textbox(self._first.system, label="System message", visible=self._has_template)

    @property
    def _has_template(self) -> bool:
        return self._cast.model.template is not None

    def _place_columns(self) -> None:
        options = {"height": 280, "latex_delimiters": [], "buttons": []}
        with gr.Row():
            self.base, self.model = (
                gr.Chatbot(label=describe_voice(voice), elem_id=voice.name, **options)
                for voice in self._first.voices
            )
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(
                placeholder="Ask both" if self._has_template else "A text for both to continue",
                show_label=False,
                submit_btn=True,
                autofocus=True,
                scale=8,
                elem_id="question",
            )
            self.stop = gr.Button("Stop", size="md", scale=0, min_width=90, elem_id="stop")
            self.anew = gr.Button("New conversation", size="md", scale=0, min_width=190, elem_id="new")

    def _place_tokens(self) -> None:
        with gr.Row():
            gr.HTML('<h3 class="section">Where the two disagree</h3>')
            self.whose = gr.Radio(
                list(_WHOSE), value=next(iter(_WHOSE)), show_label=False, container=False, elem_id="whose"
            )
        with gr.Row():
            with gr.Column(scale=3):
                self.said = gr.HTML(summary([]), elem_id="summary")
                self.tokens = gr.HighlightedText(
                    show_label=False, show_whitespaces=True, combine_adjacent=False, elem_id="tokens"
                )
            with gr.Column(scale=2):
                self.guesses = gr.HTML(elem_id="guesses")

    def _connect(self) -> None:
        settings = [self.packs, self.temperature, self.top_p, self.most, self.seed, self.system]
        columns, looked = [self.base, self.model], [self.places, self.said, self.tokens, self.guesses]
        asked = self.question.submit(
            self._ask, [self.talk, self.question, *settings], [self.talk, self.question, *columns]
        )
        asked.then(self._look, [self.talk, self.whose], looked)
        again = self.packs.input(self._ask_again, [self.talk, *settings], [self.talk, *columns])
        again.then(self._look, [self.talk, self.whose], looked)
        self.whose.input(self._look, [self.talk, self.whose], looked)
        self.tokens.select(_choose, self.places, self.guesses)
        self.stop.click(lambda talk: talk and talk.stop(), self.talk, None, queue=False)
        self.anew.click(self._forget, [self.talk, self.whose], [*columns, *looked])

    def _begin(self) -> Talk:
        return Talk(self._cast, compare=True, sampling=self._first.sampling)

    def _ask(self, talk: Talk | None, question: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
        with _said():
            talk = talk or self._begin()
            _set(talk, *settings)
            if question.strip():
                for columns in _growing(talk, question.strip()):
                    yield (talk, "", *columns)
            else:
                yield (talk, "", *_columns(talk))

    def _ask_again(self, talk: Talk | None, *settings: Any) -> Iterator[tuple[Any, ...]]:
        """Ask all questions anew: what would have been said with other packs on, from the beginning."""
        with _said():
            talk = talk or self._begin()
            questions = [turn.question for turn in talk.turns]
            _set(talk, *settings)
            talk.reset()
            yield (talk, *_columns(talk))
            for question in questions:
                for columns in _growing(talk, question):
                    yield (talk, *columns)

    def _look(self, talk: Talk | None, whose: str) -> tuple[Any, ...]:
        try:
            places = _places(talk, _WHOSE[whose]) if talk else []
        except DeepenError as error:
            return [], str(error), [], ""
        shown = guess_tables(places, first_difference(places))
        return places, summary(places), marked_tokens(places), shown

    def _forget(self, talk: Talk | None, whose: str) -> tuple[Any, ...]:
        talk = talk or self._begin()
        talk.reset()
        return (*_columns(talk), *self._look(talk, whose))


def _choose(places: list[Place], event: gr.SelectData) -> str:
    return guess_tables(places, event.index)


def _set(
    talk: Talk,
    packs: Sequence[str],
    temperature: float,
    top_p: float,
    most: float,
    seed: float,
    system: str,
) -> None:
    talk.stop()
    talk.switch(packs)
    talk.sampling = Sampling(
        temperature=temperature, top_p=top_p, max_tokens=int(most or 1), seed=int(seed or 0)
    )
    talk.system = system


def _growing(talk: Talk, question: str) -> Iterator[tuple[Any, Any]]:
    """Yield both columns as the answers grow, not oftener than an eye can see."""
    shown = 0.0
    yield _columns(talk, question)
    for answers in talk.ask(question):
        if time.monotonic() - shown > _EVERY:
            shown = time.monotonic()
            yield _columns(talk, question, answers)
    yield _columns(talk)


def _columns(talk: Talk, question: str = "", growing: Sequence[Answer] = ()) -> tuple[Any, Any]:
    """Return what stands in both columns: what was said, and the answers that grow."""
    texts = {answer.voice.name: answer.text for answer in growing}
    base, model = (
        gr.update(value=_messages(talk, voice.name, question, texts), label=describe_voice(voice))
        for voice in talk.voices
    )
    return base, model


def _messages(talk: Talk, voice: str, question: str, growing: dict[str, str]) -> list[dict[str, str]]:
    said = [(turn.question, turn.answers.get(voice, "")) for turn in talk.turns]
    said += [(question, growing.get(voice, ""))] if question else []
    return [
        {"role": role, "content": text}
        for pair in said
        for role, text in zip(("user", "assistant"), pair, strict=True)
        if text
    ]


def _places(talk: Talk, whose: str) -> list[Place]:
    """Compare base and model on one's last answer."""
    answer = next((each for each in talk.answers if each.voice.name == whose), None)
    if answer is None:
        return []
    base, model = talk.voices
    return compare_next_tokens(base, model, answer.prompt.ids, answer.ids)


@contextmanager
def _said() -> Iterator[None]:
    """Show the user's errors on the page, without a traceback in the terminal."""
    try:
        yield
    except DeepenError as error:
        raise gr.Error(str(error), print_exception=False) from None
