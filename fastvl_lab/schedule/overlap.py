"""Overlap inside one request: a second thread unpacks the next image while this one is encoded and the prompt computed up to it.

The prompt is computed in pieces, each as soon as its visual tokens are there: the text before the first image beside its unpacking,
then an image with the text behind it, while the images after it are unpacked. What is left when the last image is encoded is that
image and the text behind it. RServe (arXiv 2509.24381) schedules so inside a request.

The tokens are those without overlap. Keys and values are equal up to rounding: an image goes through the tower alone, and a piece
through the decoder, so that products have other shapes. Only the worker's unpacking runs on the second thread: everything else is
launched by the first, in order, and on CUDA nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastvl_lab.schedule.in_flight import InFlight
from fastvl_lab.schedule.loop import unpackers


class Piece(NamedTuple):
    """What of a prompt is computed at once.

    begins: the number of the image that must be made for it, if any; images: those whose tokens it has, by number; end: the token
    behind its last, counted from where the prompt is not in the KV cache.
    """

    begins: int | None
    images: range
    end: int


def pieces(images: Sequence[tuple[int, int]], to_make: Sequence[int], reused: int, n_tokens: int) -> list[Piece]:
    """A prompt of n_tokens, the first `reused` of which are in the KV cache, cut before each image that is to be made.

    images: of each, in order, its first token and how many it has. Images that are known stay with what stands before them.
    """
    begins = [None, *to_make]
    ends = [*(max(images[number][0] - reused, 0) for number in to_make), n_tokens - reused]
    behind = [*to_make, len(images)]
    cut = [Piece(b, range(b or 0, last), end) for b, last, end in zip(begins, behind, ends, strict=True)]
    return cut if cut[0].end > 0 else cut[1:]  # nothing is before the first


def worker(device: torch.device) -> ThreadPoolExecutor:
    """The thread that unpacks; on a CPU it computes with one of OpenMP's, since the first thread needs the cores."""
    if device.type == "cpu":
        return unpackers(device, 1)
    return ThreadPoolExecutor(1, thread_name_prefix="fastvl-unpack", initializer=torch.cuda.set_device, initargs=(device,))


def first_token(flight: InFlight, unpacking: ThreadPoolExecutor) -> None:
    """From an opened request to the first token of its answer; raises what its images are refused for."""
    flight.take_place()
    place, done = flight.place, 0
    with _unpacked(flight, unpacking) as unpacked:
        flight.upload_prompt()
        for piece in pieces(flight.images, place.to_make, place.reused, flight.n_prompt):
            if piece.begins is not None:
                with flight.tracer.span("await_image"):
                    patches = unpacked.pop(0).result()
                flight.upload_image(piece.begins, patches)
            flight.encode(images=piece.images, end=piece.end)
            flight.prefill(piece.end - done)
            done = piece.end


@contextmanager
def _unpacked(flight: InFlight, unpacking: ThreadPoolExecutor) -> Iterator[list[Future[torch.Tensor]]]:
    """The patches of each image that is to be made, in order, on their way; on leaving nothing more is done for the request."""
    to_make = flight.place.to_make
    each = flight.patches_of_each() if to_make else iter(())

    def one() -> torch.Tensor:
        with torch.inference_mode(), flight.tracer.beside():
            return next(each)

    under_way = [unpacking.submit(one) for _ in to_make]
    try:
        yield under_way
    finally:
        for future in under_way:
            future.cancel()
        wait(under_way)
