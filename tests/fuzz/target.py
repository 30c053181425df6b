"""What is fuzzed: a reader, the errors it may raise, and where its corpus is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
ANY = "any"  # the corpus that all targets try, too

Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Target:
    """A reader of bytes.

    Attributes:
        name: What it reads.
        read: The reader. It also checks what it can of the outcome.
        errors: What it may raise: the errors that it documents.
        corpus: The folder of inputs to begin from; targets of one family share one.
        words: What the format is made of, so that an input at random gets past the first look.
    """

    name: str
    read: Callable[[bytes], object]
    errors: Errors = ()
    corpus: str = ""
    words: tuple[bytes, ...] = ()

    @property
    def folder(self) -> str:
        """The folder of its own corpus."""
        return self.corpus or self.name.replace(" ", "-")

    def seeds(self) -> list[Path]:
        """List the inputs of its corpus, and of that of all."""
        return [path for name in (self.folder, ANY) for path in sorted((CORPUS / name).glob("*"))]

    def accepts(self, data: bytes) -> bool:
        """Read an input; tell whether it was read, or refused as is documented.

        Raises:
            Exception: Neither: the reader has a fault.
        """
        try:
            self.read(data)
        except self.errors:
            return False
        return True
