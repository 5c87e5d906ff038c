"""Real terminals for tests: `open_terminal` makes one, whose screen can be read."""

import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import TextIO


@dataclass
class Terminal:
    """A terminal: what is written to `file` appears on its screen."""

    file: TextIO
    output: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything that was written, with control characters, once the terminal is closed."""
        return "".join(self.output)

    @property
    def screen(self) -> list[str]:
        """The lines of the screen, once the terminal is closed: a carriage return overwrites a line."""
        lines, column = [""], 0
        for character in self.text:
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append("")
            else:
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + character + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]

    def read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", newline="") as reader:
            try:
                while text := reader.read(1):
                    self.output.append(text)
            except OSError:  # on Linux, the end of a terminal
                pass


@contextmanager
def open_terminal(columns: int) -> Iterator[Terminal]:
    """Open a terminal of this width. Read it after the block."""
    master, descriptor = os.openpty()
    termios.tcsetwinsize(descriptor, (24, columns))
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        terminal = Terminal(file)
        reader = Thread(target=terminal.read, args=[master])
        reader.start()
        yield terminal
    reader.join(10)
