"""Chat in the browser: with one model, two side by side, or in a blind arena that counts votes.

    python -m alpaca_rlhf.inference.web_chat --path output/final/actor
    python -m alpaca_rlhf.inference.web_chat --path output/final/actor output/actor [--arena]

Takes folders of step 1 or 3, adapters' folders or hub ids. Bound to this machine only, with no
public link unless --share asks for one, no telemetry, and nothing fetched from elsewhere; needs
`pip install gradio`. In the arena the sides are drawn anew for every message, the names shown after
the vote, and each vote is appended to --votes as a preference pair that step 2 trains on.
"""

import argparse
import os
import queue
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.inference.chat_model import ChatModel, Job
    from alpaca_rlhf.inference.conversation import Conversation
    from alpaca_rlhf.inference.votes import VoteBook
    from alpaca_rlhf.utils.configs import SamplingConfig
    from alpaca_rlhf.utils.data.tokenizer import Message

SIDES = ("Left", "Right")
THREADS = 64  # chats that may wait at the same time; the others wait in Gradio's own queue
_FONTS = ["system-ui", "sans-serif"]  # of the browser: none is fetched


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser("python -m alpaca_rlhf.inference.web_chat", __doc__)
    parser.add("--path", "one model, or two: folders of models or adapters, or hub ids",
               nargs="+", required=True)
    parser.add("--arena", "hide which of the two models is which, and vote", action="store_true")
    parser.add("--votes", "file that the arena's votes are appended to", default="votes.jsonl")
    parser.add("--system", "text that stands before every dialogue", default="")
    parser.add("--host", "address to listen at", default="127.0.0.1")
    parser.add("--port", "port to listen at; 0 takes a free one",
               type=flags.number(int, low=0, high=65535), default="7860")
    parser.add("--share", "make a public link through Gradio's servers", action="store_true")
    parser.add("--at_once", "chats of a model that stream at the same time; the others wait",
               type=flags.number(int, low=1), default="8")
    parser.add_sampling(temperature=0.7, top_p=0.95)
    parser.add_loading()
    args = parser.parse_args(argv)
    if len(args.path) > 2:
        raise UserError(f"--path: {len(args.path)} models; give one or two")
    if args.arena and len(args.path) != 2:
        raise UserError("--arena: needs two models; give --path A B")
    # Before Gradio is imported: it reads this then, and asks its servers for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    flags.require("gradio")
    return args


def main(args: argparse.Namespace) -> None:
    """Load the models and serve the page until stopped."""
    from alpaca_rlhf.evaluation.saved import open_policy, short_names
    from alpaca_rlhf.inference.chat_model import ChatModel
    from alpaca_rlhf.inference.serve import listen
    from alpaca_rlhf.inference.votes import VoteBook

    with listen(args.host, args.port) as found:  # taken for a moment: busy ports show at once
        port = found.getsockname()[1]
    book = VoteBook(Path(args.votes)) if args.arena else None
    policies = [open_policy(path, flags.load_options(args)) for path in args.path]
    sampling = flags.sampling(args, min(policy.context for policy in policies))
    models = [ChatModel(policy, args.at_once) for policy in policies]
    for note in book.notes if book else []:
        sys.stdout.write(note + "\n")
    site = Site(short_names(args.path), models, sampling, args.system, book)
    launch(site, args.host, port, args.share)


def launch(site: "Site", host: str, port: int, share: bool = False, wait: bool = True) -> Any:
    """Serve the page; gives Gradio's Blocks back at once where it is not to wait."""
    import gradio

    page = site.page()
    page.queue(default_concurrency_limit=THREADS)
    page.launch(
        server_name=host, server_port=port, share=share, inbrowser=False, quiet=True,
        prevent_thread_lock=True, show_error=True, max_threads=2 * THREADS, ssr_mode=False,
        footer_links=[], theme=gradio.themes.Default(font=_FONTS, font_mono=["monospace"]),
    )
    sys.stdout.write(f"chat with {' and '.join(site.names)} at http://{host}:{port}\n")
    if share:
        sys.stdout.write(f"public link: {page.share_url}\n")
    sys.stdout.flush()
    if wait:
        page.block_thread()
    return page


@dataclass
class Room:
    """What one visitor has before them.

    Attributes:
        talks: a dialogue for each side.
        models: which model stands on each side.
        asked: in the arena, the messages whose replies no vote was given on yet.
        better: the side that the last vote was for, and both go on with.
        jobs: the replies that are being drawn.
    """

    talks: "list[Conversation]"
    models: list[int]
    asked: "list[Message]" = field(default_factory=list)
    better: int | None = None
    jobs: "list[Job]" = field(default_factory=list)

    def stop(self) -> None:
        """End the replies where they are."""
        for job in self.jobs:
            job.cancel()

    def deal(self) -> None:
        """Begin a round of the arena: both sides know the better reply, and may change places."""
        if self.better is not None:
            turns = self.talks[self.better].turns
            for talk in self.talks:
                talk.turns = list(turns)
        self.better = None
        random.shuffle(self.models)


class Site:
    """The page and what its buttons do.

    Args:
        names: of the models, for people.
        models: one or two.
        sampling: where the settings begin.
        system: text before every dialogue.
        book: of votes; then it is an arena.
    """

    def __init__(
        self, names: list[str], models: "list[ChatModel]", sampling: "SamplingConfig",
        system: str = "", book: "VoteBook | None" = None,
    ) -> None:
        self.names, self._models, self._sampling = names, models, sampling
        self._system, self._book = system.strip(), book

    def _room(self) -> Room:
        from alpaca_rlhf.inference.conversation import Conversation

        sides = range(len(self._models))
        return Room([Conversation(self._system) for _ in sides], list(sides))

    # --------------------------------------------------------------- what the buttons do

    def answer(
        self, text: str, room: Room | None, temperature: float, top_p: float, new_tokens: float
    ) -> Iterator[tuple]:
        """Stream the reply of each side.

        Yields:
            The text box, the room, a notice, and the dialogue of each side.
        """
        room = room or self._room()
        if room.jobs or room.asked:
            notice = "Still answering." if room.jobs else "Vote on these replies first, or clear."
            yield (text, room, notice, *self._shown(room))
            return
        if self._book is not None:
            room.deal()
        pieces: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        before = [talk.turns for talk in room.talks]
        try:
            sampling = replace(self._sampling, temperature=temperature, top_p=top_p,
                               max_new_tokens=int(new_tokens))
            asked = [talk.asked(text or "") for talk in room.talks]
            for side, (talk, messages) in enumerate(zip(room.talks, asked, strict=True)):
                model = self._models[room.models[side]]
                room.jobs.append(model.submit(messages, sampling, partial(_put, pieces, side)))
                talk.answered(messages, "")
            room.asked = asked[0] if self._book is not None else []
            yield ("", room, "…", *self._shown(room))
            yield from self._follow(room, pieces)
            yield ("", room, "Which is better?" if self._book else "", *self._shown(room))
        except UserError as error:  # on one side: then on neither anything was said
            room.asked = []
            for talk, turns in zip(room.talks, before, strict=True):
                talk.turns = turns
            yield (text, room, f"**{error}**", *self._shown(room))
        finally:
            room.stop()
            room.jobs = []

    def _follow(self, room: Room, pieces: "queue.SimpleQueue[tuple[int, Any]]") -> Iterator[tuple]:
        """Put pieces into the dialogues as they come, until every side has ended."""
        from alpaca_rlhf.inference.chat_model import End

        going = len(room.talks)
        while going:
            arrived = [pieces.get()]
            while not pieces.empty():
                arrived.append(pieces.get())
            for side, piece in arrived:
                if isinstance(piece, Exception):
                    raise UserError(f"the model failed: {type(piece).__name__}: {piece}")
                if isinstance(piece, End):
                    going -= 1
                else:
                    room.talks[side].turns[-1]["content"] += piece
            yield ("", room, "…", *self._shown(room))

    def vote(self, side: int | None, room: Room | None) -> tuple:
        """Keep a vote for a side (None: a tie, a reply drawn by lot goes on), and show the names.

        Returns:
            The room, a notice, and the dialogue of each side.
        """
        from alpaca_rlhf.inference.votes import Written

        assert self._book is not None
        if room is None or room.jobs or not room.asked:
            notice = "Wait for both replies." if room and room.jobs else "Write something first."
            return room, notice, *self._shown(room)
        better = random.choice((0, 1)) if side is None else side
        first, second = (
            Written(self._models[room.models[i]].policy.name, room.talks[i].turns[-1]["content"])
            for i in (better, 1 - better)
        )
        self._book.add(room.asked, first, second, tie=side is None)
        room.asked, room.better = [], better
        who = ", ".join(
            f"{SIDES[i]}: {self.names[model]}" for i, model in enumerate(room.models)
        )
        return room, f"**{who}**. {self._tally()}", *self._shown(room)

    def _tally(self) -> str:
        assert self._book is not None
        found = self._book.tally(*(model.policy.name for model in self._models))
        return f"{found.describe(self.names[0])}."

    def stop(self, room: Room | None) -> None:
        """End the replies where they are; what there is of them stays."""
        if room is not None:
            room.stop()

    def clear(self, room: Room | None) -> tuple:
        """Begin anew."""
        self.stop(room)
        room = self._room()
        return room, "", *self._shown(room)

    def _shown(self, room: Room | None) -> list[list[dict[str, str]]]:
        room = room or self._room()
        return [[{**turn} for turn in talk.turns] for talk in room.talks]

    # --------------------------------------------------------------- the page

    def page(self) -> Any:
        """Gradio's Blocks."""
        import gradio

        arena = self._book is not None
        labels = SIDES if arena else self.names
        with gradio.Blocks(analytics_enabled=False, title="alpaca-rlhf") as page:
            room = gradio.State(None)
            with gradio.Row():
                chats = [_chatbot(gradio, labels[i], i) for i in range(len(self._models))]
            notice = gradio.Markdown(self._opening(), elem_id="notice")
            if arena:
                with gradio.Row():
                    for name, side in (("left", 0), ("tie", None), ("right", 1)):
                        title = "Tie" if side is None else f"{SIDES[side]} is better"
                        gradio.Button(title, elem_id=f"vote-{name}").click(
                            partial(self.vote, side), [room], [room, notice, *chats],
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
            settings = self._settings(gradio)
            asked = gradio.on(
                [send.click, text.submit], self.answer, [text, room, *settings],
                [text, room, notice, *chats], api_visibility="private",
            )
            stop.click(self.stop, [room], None, api_visibility="private")
            # The bin in a corner of each chat clears as the button does.
            gradio.on([clear.click, *(chat.clear for chat in chats)], self.clear, [room],
                      [room, notice, *chats], cancels=[asked], api_visibility="private")
        return page

    def _opening(self) -> str:
        if self._book is None:
            return ""
        return f"Two models, hidden until the vote. {self._tally()}"

    def _settings(self, gradio: Any) -> list[Any]:
        sampling = self._sampling
        context = min(model.policy.context for model in self._models)
        with gradio.Accordion("Settings", open=False):
            return [
                gradio.Slider(0, 2, sampling.temperature, step=0.05, label="temperature"),
                gradio.Slider(0.05, 1, sampling.top_p, step=0.05, label="top_p"),
                gradio.Slider(1, context - 1, sampling.max_new_tokens, step=1,
                              label="max_new_tokens"),
            ]


def _put(pieces: "queue.SimpleQueue[tuple[int, Any]]", side: int, piece: Any) -> None:
    pieces.put((side, piece))


def _chatbot(gradio: Any, label: str, side: int) -> Any:
    # As it was written: markdown could hide what a model said, and fetch pictures from elsewhere.
    return gradio.Chatbot(
        label=label, elem_id=f"chat-{side}", height="60vh", render_markdown=False,
        buttons=["copy"], latex_delimiters=[],
    )


if __name__ == "__main__":
    flags.run(parse, main)
