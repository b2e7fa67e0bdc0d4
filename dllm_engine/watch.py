"""The denoising drawn live in a terminal: a streamer for `decode` that shows every step's canvas."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from dllm_engine.model import LLaDA


class Watch:
    """Draws decided tokens as text and undecided ones as dots; new tokens of a step are highlighted.

    Use it as a context manager around one `decode` of one sequence.
    """

    def __init__(self, model: LLaDA, title: str, console: Console | None = None) -> None:
        self.model, self.title = model, title
        self.live = Live(console=console, refresh_per_second=30)
        self.done: list[int] = []
        self.draft: list[int] = []
        self.steps, self.counted = 0, False
        self.prompt_pending = True

    def __enter__(self) -> Watch:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)
        if not self.live.console.is_terminal:
            self.live.console.line()  # rich ends the last panel's line in terminals only

    def put(self, value: Tensor) -> None:
        """The prompt first, then the tokens of every finished block."""
        if self.prompt_pending:
            self.prompt_pending = False
            return
        tokens = value.flatten().tolist()
        self.steps, self.counted = self.steps + 1, True  # what follows the block is drawn in the same step
        self._draw(tokens)
        self.done += tokens
        self.draft = self.draft[len(tokens) :]

    def put_draft(self, value: Tensor) -> None:
        """The canvas from the first unfinished block on, after each step."""
        self.steps, self.counted = self.steps + (not self.counted), False
        self._draw(value.flatten().tolist())

    def end(self) -> None:
        self.draft = []
        self.live.update(self._panel(Text(self._words(self.done))), refresh=True)

    def _draw(self, draft: list[int]) -> None:
        text = Text(self._words(self.done), style="dim")
        before = self.draft or [self.model.mask_id] * len(draft)
        for i, token in enumerate(draft):
            if token == self.model.mask_id:
                text.append(" ·", style="dim")
            elif token not in self.model.end_ids:
                new = i >= len(before) or before[i] != token
                text.append(self._words([token], lead=True), style="bold green" if new else "")
        self.draft = draft
        self.live.update(self._panel(text), refresh=True)

    def _panel(self, text: Text) -> Panel:
        return Panel(
            text, title=Text(self.title), subtitle=f"step {self.steps}", title_align="left", subtitle_align="right"
        )

    def _words(self, ids: list[int], lead: bool = False) -> str:
        tokens = [i for i in ids if i not in self.model.end_ids]
        if not tokens:
            return ""
        word = str(self.model.tokenizer.decode(tokens))
        pieces = self.model.tokenizer.convert_ids_to_tokens(tokens[:1])
        return " " + word if lead and pieces[0].startswith(("▁", "Ġ")) and not word.startswith(" ") else word
