"""The interval arithmetic of InfLLM: integers only.

One vLLM block holds B tokens and is one unit. Seen from an execution block [s, e), n_local = 4B, n_init = B:

    token      0         B         2B        3B      ...              s - n_local      s       e
               |---------|---------|---------|--- ... ---|---------|--------.----------|-------|
               | initial |  unit 0 |  unit 1 |    ...    | unit U-1|  edge  .    window        |
               |<-------------- stored ----------------------------->|<---- paged cache ------>|
                                                                     ^ edge_start(s)

A *stored* block lies wholly outside the window of token s - 1, and so of s and all later ones: its un-rotated keys and
its values are in the host store. The first n_init/B stored blocks are the initial tokens (always attended); block
b >= n_init/B is the sealed unit u = b - n_init/B. Tokens from `edge_start` on are read from the paged cache: with their
rotation where they are inside a query's window (local part), without it where they have left it (remainder part, and
initial tokens whose block is not stored yet).
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Geometry:
    """Token ranges for one configuration; all sizes in tokens, n_init and n_local multiples of block_size."""

    block_size: int
    n_init: int
    n_local: int
    exc_block_size: int

    @property
    def init_blocks(self) -> int:
        """Number of blocks that hold the initial tokens."""
        return self.n_init // self.block_size

    def stored_blocks(self, s: int) -> int:
        """Number of leading blocks that lie wholly outside the window of token s - 1."""
        return max(0, (s - self.n_local) // self.block_size)

    def sealed_units(self, s: int) -> int:
        """U(s): number of units sealed for an execution block that starts at token s."""
        return max(0, self.stored_blocks(s) - self.init_blocks)

    def edge_start(self, s: int) -> int:
        """First token that an execution block starting at s reads from the paged cache."""
        return self.stored_blocks(s) * self.block_size

    def execution_blocks(self, start: int, end: int, prompt_len: int) -> list[tuple[int, int]]:
        """Cut the scheduled tokens [start, end) into execution blocks.

        Cuts lie at multiples of exc_block_size and before the last token of the prompt, so that the first answer
        token is retrieved for by its own query.
        """
        cuts = {start, end}
        cuts.update(range((start // self.exc_block_size + 1) * self.exc_block_size, end, self.exc_block_size))
        if start < prompt_len - 1 < end:
            cuts.add(prompt_len - 1)
        ordered = sorted(cuts)
        return list(pairwise(ordered))

    def chunk_end(self, start: int, end: int, known_tokens: int) -> int:
        """Where a prefill chunk [start, end) must stop: at a multiple of exc_block_size or at the last known token.

        Returns `start` when the token budget does not reach the next such place.
        """
        if end >= known_tokens:
            return end
        return max(start, end // self.exc_block_size * self.exc_block_size)

    def window_blocks(self, tokens_per_step: int) -> int:
        """Most paged blocks that hold the window and the tokens of one step.

        Blocks stored in the step before are free, so the first block held is block `stored_blocks(computed)`: up to
        n_local + B - 1 computed tokens remain, followed by the tokens of the step.
        """
        return -(-(self.n_local + self.block_size - 1 + tokens_per_step) // self.block_size)
