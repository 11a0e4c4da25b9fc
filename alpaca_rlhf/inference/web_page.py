"""The page of the web chat: one model, two side by side, or a blind arena."""

import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import gradio

from alpaca_rlhf.evaluation.conversation import Conversation
from alpaca_rlhf.inference.chat_model import ChatModel, End, Job, Piece
from alpaca_rlhf.inference.votes import VoteFile
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.console import say
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError

SIDES = ("Left", "Right")
THREADS = 64  # chats that may wait at the same time; further ones wait in Gradio's own queue
_FONTS = ["system-ui", "sans-serif"]  # the browser's own: none is fetched


def launch(site: "Site", host: str, port: int, share: bool = False) -> gradio.Blocks:
    """Begin to serve the page, in other threads."""
    page = site.page()
    page.queue(default_concurrency_limit=THREADS)
    page.launch(
        server_name=host, server_port=port, share=share, inbrowser=False, quiet=True,
        prevent_thread_lock=True, show_error=True, max_threads=2 * THREADS, ssr_mode=False,
        footer_links=[], theme=gradio.themes.Default(font=_FONTS, font_mono=["monospace"]),
    )
    say(f"chat with {' and '.join(site.names)} at http://{host}:{port}")
    if share:
        say(f"public link: {page.share_url}")
    return page


@dataclass
class Visit:
    """The state of one visitor."""

    conversations: list[Conversation]  # of each side
    models: list[int]  # index of the model on each side
    unvoted: list[Message] = field(default_factory=list)  # prompt whose responses await a vote
    better: int | None = None  # side of the last vote; both continue with its response
    jobs: list[Job] = field(default_factory=list)  # responses that are being generated

    def next_round(self) -> None:
        """Give both sides the better response of the last vote, and put them in random order."""
        if self.better is not None:
            turns = self.conversations[self.better].turns
            for conversation in self.conversations:
                conversation.turns = list(turns)
        self.better = None
        random.shuffle(self.models)

    def shown(self) -> list[list[Message]]:
        """Return the turns of each side, for Gradio."""
        return [[{**turn} for turn in one.turns] for one in self.conversations]


class Site:
    """The page with one or two models, and what its buttons do; with `votes` it is an arena."""

    def __init__(
        self, names: list[str], models: list[ChatModel], sampling: SamplingConfig,
        system: str = "", votes: VoteFile | None = None,
    ) -> None:
        self.names, self._models, self._sampling = names, models, sampling
        self._system, self._votes = system.strip(), votes

    def _visit(self) -> Visit:
        sides = range(len(self._models))
        return Visit([Conversation(self._system) for _ in sides], list(sides))

    # ---------------------------------------------------------------- what the buttons do

    def respond(
        self, text: str, visit: Visit | None, temperature: float, top_p: float, new_tokens: float
    ) -> Iterator[tuple]:
        """Yield the text box, the visit, a notice, and the turns of each side as they grow."""
        visit = visit or self._visit()
        if visit.jobs or visit.unvoted:
            notice = ("Still generating." if visit.jobs
                      else "Vote on these responses first, or clear.")
            yield (text, visit, notice, *visit.shown())
            return
        if self._votes is not None:
            visit.next_round()
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        before = [conversation.turns for conversation in visit.conversations]
        sampling = replace(self._sampling, temperature=temperature, top_p=top_p,
                           max_new_tokens=int(new_tokens))
        try:
            prompts = [one.with_prompt(text or "") for one in visit.conversations]
            for side, messages in enumerate(prompts):
                model = self._models[visit.models[side]]
                visit.jobs.append(model.submit(messages, sampling, pieces.put))
                visit.conversations[side].store(messages, "")
            visit.unvoted = prompts[0] if self._votes is not None else []
            yield ("", visit, "…", *visit.shown())
            yield from self._follow(visit, pieces)
            yield ("", visit, "Which is better?" if self._votes else "", *visit.shown())
        except UserError as error:  # on one side: then neither side keeps the message
            visit.unvoted = []
            for conversation, turns in zip(visit.conversations, before, strict=True):
                conversation.turns = turns
            yield (text, visit, f"**{error}**", *visit.shown())
        finally:
            self.stop(visit)
            visit.jobs = []

    def _follow(self, visit: Visit, pieces: "queue.SimpleQueue[Piece]") -> Iterator[tuple]:
        """Show the text of all sides whenever a piece has arrived, until every side has ended."""
        running = len(visit.jobs)
        while running:
            arrived = [pieces.get()]
            while not pieces.empty():
                arrived.append(pieces.get())
            for piece in arrived:
                if isinstance(piece, Exception):
                    raise UserError(f"the model failed: {type(piece).__name__}: {piece}")
                running -= isinstance(piece, End)
            for conversation, job in zip(visit.conversations, visit.jobs, strict=True):
                conversation.turns[-1]["content"] = job.text
            yield ("", visit, "…", *visit.shown())

    def vote(self, side: int | None, visit: Visit | None) -> tuple:
        """Record a vote for a side, and return the visit, a notice with the names, and the turns.

        None is a tie, after which both sides continue with a response chosen at random.
        """
        assert self._votes is not None
        visit = visit or self._visit()
        if visit.jobs or not visit.unvoted:
            notice = "Wait for both responses." if visit.jobs else "Write something first."
            return visit, notice, *visit.shown()
        better = random.choice((0, 1)) if side is None else side
        ranking = (better, 1 - better)
        self._votes.add(
            visit.unvoted, [self._models[visit.models[i]].policy.name for i in ranking],
            [visit.conversations[i].turns[-1]["content"] for i in ranking], tie=side is None,
        )
        visit.unvoted, visit.better = [], better
        who = ", ".join(f"{side}: {self.names[model]}"
                        for side, model in zip(SIDES, visit.models, strict=True))
        return visit, f"**{who}**. {self._tally(self._votes)}", *visit.shown()

    def _tally(self, votes: VoteFile) -> str:
        first, second = (model.policy.name for model in self._models)
        return f"{votes.tally(first, second, self.names[0])}."

    def stop(self, visit: Visit | None) -> None:
        """End the responses where they are; what there is of them stays."""
        for job in visit.jobs if visit is not None else []:
            job.cancel()

    def clear(self, visit: Visit | None) -> tuple:
        """Start new dialogues."""
        self.stop(visit)
        visit = self._visit()
        return visit, "", *visit.shown()

    # ---------------------------------------------------------------- the page

    def page(self) -> gradio.Blocks:
        """Build the page."""
        labels = self.names if self._votes is None else SIDES
        opening = "" if self._votes is None else (
            f"Two models, hidden until the vote. {self._tally(self._votes)}")
        with gradio.Blocks(analytics_enabled=False, title="alpaca-rlhf") as page:
            visit = gradio.State(None)
            with gradio.Row():
                # Plain text: Markdown could hide parts of a response, or fetch pictures.
                chats = [
                    gradio.Chatbot(
                        label=label, elem_id=f"chat-{side}", height="60vh", render_markdown=False,
                        buttons=["copy"], latex_delimiters=[],
                    ) for side, label in enumerate(labels)
                ]
            notice = gradio.Markdown(opening, elem_id="notice")
            if self._votes is not None:
                with gradio.Row():
                    for name, side in (("left", 0), ("tie", None), ("right", 1)):
                        title = "Tie" if side is None else f"{SIDES[side]} is better"
                        gradio.Button(title, elem_id=f"vote-{name}").click(
                            partial(self.vote, side), [visit], [visit, notice, *chats],
                            api_visibility="private",
                        )
            text = gradio.Textbox(
                label="Message", placeholder="Enter sends, Shift+Enter is a new line", lines=1,
                max_lines=8, autofocus=True, elem_id="message",
            )
            with gradio.Row():
                send = gradio.Button("Send", variant="primary", elem_id="send")
                stop = gradio.Button("Stop", elem_id="stop")
                clear = gradio.Button("Clear", elem_id="clear")
            sent = gradio.on(
                [send.click, text.submit], self.respond, [text, visit, *self._settings()],
                [text, visit, notice, *chats], api_visibility="private",
            )
            stop.click(self.stop, [visit], None, api_visibility="private")
            # The bin in a corner of each chat does what the button does.
            gradio.on([clear.click, *(chat.clear for chat in chats)], self.clear, [visit],
                      [visit, notice, *chats], cancels=[sent], api_visibility="private")
        return page

    def _settings(self) -> list[gradio.Slider]:
        sampling = self._sampling
        context = min(model.policy.context for model in self._models)
        with gradio.Accordion("Settings", open=False):
            return [
                gradio.Slider(0, 2, sampling.temperature, step=0.05, label="temperature"),
                gradio.Slider(0.05, 1, sampling.top_p, step=0.05, label="top_p"),
                gradio.Slider(1, context - 1, sampling.max_new_tokens, step=1,
                              label="max_new_tokens"),
            ]
